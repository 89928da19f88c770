"""CTranslate2 on the CPU, in float32, through its converter of transformers' models. It gives logits alone."""

from __future__ import annotations

import sys
from pathlib import Path

import adapting
import ctranslate2
import numpy as np

FOLDER = Path(sys.argv[1])
OPENED: dict[str, ctranslate2.Generator] = {}


def load(path):
    if path not in OPENED:
        source = adapting.with_tokenizer(path, FOLDER / "with-tokenizer")
        out = FOLDER / "converted" / Path(source).name
        ctranslate2.converters.TransformersConverter(source).convert(str(out), quantization="float32", force=True)
        OPENED[path] = ctranslate2.Generator(str(out), device="cpu", compute_type="float32", intra_threads=1)
    return OPENED[path]


def forward_file(path, tokens):
    return np.array(load(path).forward_batch([tokens.tolist()], return_log_probs=False))[0]


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("ctranslate2", "transformers", "torch"))
