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
    return adapting.constants(c, c.rope_parameters["rope_theta"], c.rope_parameters, c.head_dim)


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
