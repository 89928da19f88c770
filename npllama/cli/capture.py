"""npllama capture: write every activation of a pass in torch."""

from __future__ import annotations

import argparse

from ..golden.precision import PRECISIONS
from .options import Batch, Commands, add_command, add_trace_options, token_ids, trace_options


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "capture", run, "write every activation of a Hugging Face model, run in torch, under our names")
    p.add_argument("source", metavar="HF_MODEL_DIR", help="folder with config.json and the weights")
    p.add_argument(
        "--tokens", action=Batch, nargs="+", type=token_ids, required=True, metavar="1,2,3", help="several are a batch"
    )
    p.add_argument("--dtype", choices=PRECISIONS, help="what torch computes in (default: what the weights are stored in)")
    add_trace_options(p)


def run(args: argparse.Namespace) -> None:
    """Write the activations of a pass in torch."""
    from npllama_convert.capture import capture

    capture(args.source, args.tokens, dtype=args.dtype, storage=args.format, **trace_options(args))
