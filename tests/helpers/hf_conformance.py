"""Wrap Hugging Face's own modules under the names of the conformance suite's operations, in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from npllama import Config
from npllama.golden.conformance.operations import scaling_of

import hf_reference as hf


def functions(dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Return functions that compute with transformers, in float32 or bfloat16; arrays in, float32 arrays out."""

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(dtype) if x.dtype == np.float32 else torch.from_numpy(x)

    def back(x: torch.Tensor) -> np.ndarray:
        return x.detach().float().numpy()

    def model_of(params: dict[str, np.ndarray], config: Config) -> LlamaForCausalLM:
        model = LlamaForCausalLM(hf.hf_config(config)).eval()
        model.load_state_dict(hf.state_dict(config, params))
        return cast(model)

    def cast(model: LlamaForCausalLM) -> LlamaForCausalLM:
        """Convert the weights; the frequencies of RoPE stay in float32, as from_pretrained() leaves them."""
        model = model.to(dtype)
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        return model

    def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = (tensor(q).transpose(-2, -3)[None], tensor(keys)[None], tensor(values)[None])
        heads = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=tensor(mask)[None], enable_gqa=True)
        return back(heads[0].transpose(-2, -3))

    def feed_forward(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> np.ndarray:
        config = hf.hf_config(Config.from_dict({**_SMALL, "dim": x.shape[-1], "ffn_dim": len(w1)}))
        mlp = LlamaMLP(config)
        mlp.load_state_dict({"gate_proj.weight": tensor(w1), "down_proj.weight": tensor(w2), "up_proj.weight": tensor(w3)})
        return back(mlp.to(dtype)(tensor(x)))

    def block(x: np.ndarray, positions: np.ndarray, params: dict[str, np.ndarray], config: dict) -> np.ndarray:
        T = len(x)
        whole = Config.from_dict({**config, "n_layers": 1, "vocab_size": T, "tied_embeddings": True})
        named = {f"layers.0.{name}": weight for name, weight in params.items()}
        named |= {"tok_embeddings.weight": x, "norm.weight": np.ones(whole.dim, np.float32)}
        model, seen = model_of(named, whole), []
        model.model.layers[0].register_forward_hook(lambda module, given, out: seen.append(out))
        model(torch.arange(T)[None], position_ids=torch.from_numpy(positions)[None])
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        return back(out.reshape(T, -1))

    def forward(params: dict[str, np.ndarray], config: dict, tokens: np.ndarray) -> np.ndarray:
        return back(model_of(params, Config.from_dict(config))(torch.from_numpy(tokens)[None]).logits[0])

    def forward_at(params: dict[str, np.ndarray], config: dict, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        model = model_of(params, Config.from_dict(config))
        return back(model(torch.from_numpy(tokens)[None], position_ids=torch.from_numpy(positions)[None]).logits[0])

    def forward_file(path: str, tokens: np.ndarray) -> np.ndarray:
        if not path.endswith("safetensors"):
            raise NotImplementedError
        model = LlamaForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        return back(model(torch.from_numpy(tokens)[None]).logits[0])

    def forward_passes(params: dict[str, np.ndarray], config: dict, passes: list, kept: list) -> np.ndarray:
        if np.ndim(passes[0]) != 1:
            raise NotImplementedError  # padding is generate()'s business
        model, cache, found = model_of(params, Config.from_dict(config)), DynamicCache(), []
        for i, tokens in enumerate(passes):
            if i < len(kept) and kept[i] is not None:
                cache.crop(kept[i] - cache.get_seq_length())
            found.append(back(model(torch.tensor([tokens]), past_key_values=cache).logits[0]))
        return np.concatenate(found)

    def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return back(torch.nn.functional.linear(tensor(x), tensor(weight)))

    def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        norm = LlamaRMSNorm(len(weight), eps)
        norm.load_state_dict({"weight": tensor(weight)})
        return back(norm.to(dtype)(tensor(x)))

    def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        act = LlamaMLP(hf.hf_config(Config.from_dict({**_SMALL, "dim": 8, "ffn_dim": 8}))).act_fn
        return back(act(tensor(gate)) * tensor(up))

    def rope_frequencies(head_dim: int, theta: float, scaling: dict | None) -> np.ndarray:
        config = Config.from_dict({**_SMALL, "dim": head_dim, "ffn_dim": 8, "head_dim": head_dim, "rope_theta": theta})
        return back(LlamaRotaryEmbedding(hf.hf_config(replace(config, rope_scaling=scaling_of(scaling)))).inv_freq)

    def rope_half_split(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        of_batch = (x, cos, sin) if x.ndim == 4 else (x[None], cos[None], sin[None])
        q, *rotation = (tensor(part) for part in of_batch)
        whole = [torch.cat((part, part), dim=-1)[..., 0, :] for part in rotation]
        return back(apply_rotary_pos_emb(q, q, *whole, unsqueeze_dim=2)[0].reshape(x.shape))

    def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        of_batch = (q, keys, mask) if q.ndim == 4 else (q[None], keys[None], mask[None])
        queries, shared, hidden = (tensor(part) for part in of_batch)
        queries = queries.transpose(1, 2)
        repeated = repeat_kv(shared, queries.shape[1] // shared.shape[1])
        scores = torch.matmul(queries, repeated.transpose(2, 3)) * q.shape[-1] ** -0.5 + hidden
        return back(scores if q.ndim == 4 else scores[0])

    def softmax(x: np.ndarray) -> np.ndarray:
        return back(torch.nn.functional.softmax(tensor(x), dim=-1, dtype=torch.float32).to(dtype))

    operations = (linear, rms_norm, swiglu, rope_frequencies, rope_half_split, attention_scores, softmax)
    made = {function.__name__: function for function in operations}
    made |= {"attention": attention, "feed_forward": feed_forward, "block": block, "forward": forward}
    return made | {"forward_at": forward_at, "forward_file": forward_file, "forward_passes": forward_passes}


_SMALL: dict[str, Any] = {
    "n_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "head_dim": 8,
    "vocab_size": 8,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_seq_len": 64,
    "tied_embeddings": True,
}
