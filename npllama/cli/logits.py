"""npllama logits: write the logits of every position."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from ..cache import KVCache
from ..checkpoint.atomic import new_file
from ..generation import PREFILL_CHUNK
from ..model import forward
from .options import Commands, add_command, add_model_options, add_processes_option, add_prompt_options, load_model, prompt_ids


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "logits", run, "write the logits of every position: float32 [T, V]")
    add_prompt_options(p)
    p.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="the file to write")
    add_model_options(p)
    add_processes_option(p)


def run(args: argparse.Namespace) -> None:
    """Write all logits to one .npy, which appears complete or not at all."""
    model = load_model(args)
    ids = prompt_ids(args, model)
    shape = (len(ids), model.config.vocab_size)
    with new_file(args.out) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        cache = KVCache(model.config)
        for start in range(0, len(ids), PREFILL_CHUNK):
            logits = forward(model.params, model.config, ids[start : start + PREFILL_CHUNK], cache, ops=model.ops)
            file.write(np.ascontiguousarray(logits, "<f4").data)
    print(f"{args.out}: float32 {list(shape)}", file=sys.stderr)
