"""Run Hugging Face's LlamaForCausalLM for benchmarks.worker's commands. Needs torch and transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import npllama
from npllama.checkpoint import open_model
from npllama.engine.threads import n_threads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import hf_reference

PROMPT = 16
Run = Callable[[], object]


class HuggingFace:
    """The model in float32, or in bfloat16 with bfloat16 weights; the weights are in torch's own memory."""

    def __init__(self, path: str, dtype: str):
        torch.set_num_threads(n_threads())
        model = npllama.load(path, "float32") if dtype == "float32" else open_model(path)
        self.config = model.config
        state = hf_reference.state_dict(model.config, model.params)
        for name, weight in state.items():
            copy = weight.clone()  # in memory aligned as torch expects
            state[name] = copy.view(torch.bfloat16) if copy.dtype == torch.uint16 else copy
        if self.config.tied_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        config = hf_reference.hf_config(self.config)
        with torch.device("meta"):
            self.hf = LlamaForCausalLM(config).eval()
        self.hf.load_state_dict(state, assign=True)
        self.hf.model.rotary_emb = LlamaRotaryEmbedding(config)
        self.dtype = state["model.norm.weight"].dtype

    def prefill(self, n: int, n_layers: int | None = None) -> Run:
        self._use(n_layers)
        return lambda: self._forward(self._tokens(n)[None], DynamicCache())

    def decode(self, n: int, n_layers: int | None = None) -> Run:
        self._use(n_layers)
        return self._after(self._tokens(PROMPT)[None], n)

    def batch(self, size: int, n: int) -> Run:
        self._use(None)
        return self._after(self._tokens(PROMPT).repeat(size, 1), n)

    def context(self, length: int, n: int) -> Run:
        self._use(None)
        cache, config = DynamicCache(), self.config
        k = torch.randn(1, config.n_kv_heads, length, config.head_dim).to(self.dtype)
        for layer in range(config.n_layers):
            cache.update(k, k, layer)
        self._steps(cache, 1, 1)
        return lambda: self._steps(cache, 1, n)

    def _after(self, prompt: torch.Tensor, n: int) -> Run:
        cache = DynamicCache()
        self._forward(prompt, cache)
        return lambda: self._steps(cache, len(prompt), n)

    def _use(self, n_layers: int | None) -> None:
        self.hf.config.num_hidden_layers = n_layers or self.config.n_layers  # the model takes so many of its layers

    def _tokens(self, n: int) -> torch.Tensor:
        return torch.from_numpy(np.arange(n) % self.config.vocab_size)

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        return self.hf(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def _steps(self, cache: DynamicCache, size: int, n: int) -> None:
        for i in range(n):
            self._forward(torch.full((size, 1), i % self.config.vocab_size), cache)
