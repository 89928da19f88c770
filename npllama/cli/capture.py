"""npllama capture: write every activation of a forward pass in torch or llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..golden.precision import PRECISIONS
from .options import Batch, Commands, add_command, add_trace_options, token_ids, trace_options


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    summary = "write every activation of a Hugging Face model in torch, or of a GGUF file in llama.cpp, under npllama's names"
    p = add_command(commands, "capture", run, summary)
    p.add_argument("source", metavar="HF_MODEL_DIR|FILE.gguf", help="folder with config.json and the weights; or a GGUF file")
    p.add_argument(
        "--tokens", action=Batch, nargs="+", type=token_ids, required=True, metavar="1,2,3", help="several are a batch"
    )
    p.add_argument("--dtype", choices=PRECISIONS, help="precision of torch's computation (default: that of the stored weights)")
    p.add_argument(
        "--flash-attention", choices=["off", "on", "auto"], help="llama.cpp's setting (default: off, which exposes the scores)"
    )
    p.add_argument("--cache", choices=["f32", "f16"], help="dtype of llama.cpp's key/value cache (default: f32)")
    add_trace_options(p)


def run(args: argparse.Namespace) -> None:
    """Write the activations of a forward pass in torch or llama.cpp."""
    options = trace_options(args)
    if Path(args.source).suffix == ".gguf":
        from npllama_convert import llamacpp

        if args.dtype is not None:
            raise ValueError(f"--dtype is for torch: llama.cpp computes {args.source} in the precision of its stored weights")
        runtime = {"flash_attention": args.flash_attention or "off", "cache": args.cache or "f32"}
        llamacpp.capture(args.source, args.tokens, storage=args.format, **runtime, **options)
        return
    from npllama_convert.capture import capture

    if args.flash_attention or args.cache:
        raise ValueError(f"--flash-attention and --cache are for llama.cpp: {args.source} is not a .gguf file")
    capture(args.source, args.tokens, dtype=args.dtype, storage=args.format, **options)
