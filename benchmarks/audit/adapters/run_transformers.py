"""Hugging Face transformers: LlamaForCausalLM, with either attention, in float32 or bfloat16."""

from __future__ import annotations

from pathlib import Path

import adapting
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

VARIANT = adapting.job()["variant"]
DTYPE = torch.bfloat16 if VARIANT == "bfloat16" else torch.float32
ATTENTION = "eager" if VARIANT == "eager" else "sdpa"


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, attn_implementation=ATTENTION).eval()


def plain(x):
    return x.detach().float().numpy()


def resolve_config(path):
    c = AutoConfig.from_pretrained(Path(path).parent)
    rope = c.rope_parameters
    scaling = rope if rope["rope_type"] == "llama3" else {}
    return {
        "norm_eps": c.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "factor": scaling.get("factor"),
        "low_freq_factor": scaling.get("low_freq_factor"),
        "high_freq_factor": scaling.get("high_freq_factor"),
        "original_max_seq_len": scaling.get("original_max_position_embeddings"),
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "ffn_dim": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "tied_embeddings": c.tie_word_embeddings,
    }


@torch.inference_mode()
def forward_file(path, tokens):
    return plain(load(path)(torch.from_numpy(tokens)[None]).logits[0])


@torch.inference_mode()
def forward_at(path, tokens, positions):
    return plain(load(path)(torch.from_numpy(tokens)[None], position_ids=torch.from_numpy(positions)[None]).logits[0])


@torch.inference_mode()
def forward_passes(path, passes, kept):
    model, cache = load(path), DynamicCache()
    feed = lambda tokens: plain(model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0])  # noqa: E731
    return adapting.chunks(kept, passes, feed, lambda n: cache.crop(n - cache.get_seq_length()))


@torch.inference_mode()
def trace(path, tokens):
    model = load(path)
    found, _ = adapting.recording(model)
    logits = model(torch.from_numpy(tokens)[None]).logits
    return found | {"lm_head": plain(logits)} if "lm_head" not in found else {k: np.asarray(x) for k, x in found.items()}


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("transformers", "torch"))
