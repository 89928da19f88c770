"""llama.cpp through xllamacpp's wheel, with F32, Q8_0 or Q4_0 weights, with and without flash attention.

The one adapter that uses npllama: its converter's llamacpp.py declares llama.cpp's C interface. Nothing of npllama computes.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import adapting
import numpy as np

from npllama_convert import llamacpp

FOLDER = Path(sys.argv[1])
KIND, _, FLASH = adapting.job()["variant"].partition("+")


def run(path, tokens, out, steps=0):
    flash = "on" if FLASH else "off"
    return llamacpp.capture(path, tokens, out, steps=steps, flash_attention=flash, cache="f32", force=True)


def logits(path, tokens, steps=0):
    out = FOLDER / "scratch"
    trace = run(path, tokens, out, steps)
    found = [np.array(trace["logits"]), *(np.array(trace[f"step.{i}/logits"]) for i in range(np.size(steps) if steps else 0))]
    shutil.rmtree(out)
    return np.concatenate(found)


def forward_file(path, tokens):
    if KIND != "F32":
        raise adapting.NotOffered("the suite's files are F32")
    return logits(path, tokens)


def forward_passes(path, passes, kept):
    if KIND != "F32":
        raise adapting.NotOffered("the suite's files are F32")
    if kept or np.ndim(passes[0]) != 1 or any(len(tokens) != 1 for tokens in passes[1:]):
        raise adapting.NotOffered("npllama's capture runs a prompt and single tokens after it")
    return logits(path, passes[0], [tokens[0] for tokens in passes[1:]])


def capture(path, tokens, out):
    file = Path(path) if KIND == "F32" else Path(path).with_name(f"model-{KIND}.gguf")
    run(file, tokens, out)


if __name__ == "__main__":
    adapting.run(globals(), "gguf", ("xllamacpp",))
