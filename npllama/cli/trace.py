"""npllama trace: write every activation of a forward pass."""

from __future__ import annotations

import argparse

from ..golden.precision import CONVENTIONS, PRECISIONS, PROFILES, Precision, profile
from .options import (
    Commands,
    add_command,
    add_model_options,
    add_processes_option,
    add_prompt_options,
    add_trace_options,
    load_over_processes,
    prompt_ids,
    trace_options,
)


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "trace", run, "write every activation of a forward pass, one .npy each")
    add_prompt_options(p, batch=True)
    add_model_options(p, computes=False)
    add_processes_option(p)
    p.add_argument("--precision", choices=PRECISIONS, help="default: float32; bfloat16 and float16 are simulated")
    p.add_argument("--convention", choices=CONVENTIONS, help="round 16-bit values where Meta's or Hugging Face's code does")
    p.add_argument(
        "--profile", metavar="P", help=f"a rounding profile, which names precision and convention in one: {', '.join(PROFILES)}"
    )
    add_trace_options(p)


def run(args: argparse.Namespace) -> None:
    """Write the activations of a pass of npllama's own."""
    from ..golden.trace import write_trace

    precision = Precision(args.precision or "float32", args.convention)
    if args.profile is not None:
        if args.precision or args.convention:
            raise ValueError("--profile includes --precision and --convention: expected neither of them with it")
        precision = profile(args.profile)
    model, _ = load_over_processes(args, precision.load_dtype)
    write_trace(model, prompt_ids(args, model), precision=precision, storage=args.format, **trace_options(args))
