"""TransformerLens' TransformerBridge, which wraps transformers' model, in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import adapting
import torch
from transformer_lens.model_bridge import TransformerBridge

FOLDER = Path(sys.argv[1]) / "with-tokenizer"


def load(path):
    return TransformerBridge.boot_transformers(adapting.with_tokenizer(path, FOLDER), dtype=torch.float32, device="cpu")


@torch.inference_mode()
def forward_file(path, tokens):
    return load(path)(torch.from_numpy(tokens)[None])[0].float().numpy()


@torch.inference_mode()
def trace(path, tokens):
    logits, cache = load(path).run_with_cache(torch.from_numpy(tokens)[None])
    return {name: x.float().numpy() for name, x in cache.items()} | {"logits": logits.float().numpy()}


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("transformer-lens", "transformers", "torch"))
