"""npllama golden: write a bundle of reference activations for other implementations."""

from __future__ import annotations

import argparse

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
    p = add_command(commands, "golden", run, "write a bundle of reference activations to check other implementations against")
    p.add_argument("old_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)  # the old spelling of -m MODEL
    add_prompt_options(p, required=False)
    add_model_options(p, computes=False)
    add_processes_option(p)
    add_trace_options(p, storage=False)
    p.add_argument("--weights", action="store_true", help="also write the weights, in float32, to weights/")


def run(args: argparse.Namespace) -> None:
    """Write a golden bundle."""
    from ..golden.bundle import default_tokens, write_golden

    if args.old_model is not None:
        if args.model is not None:
            raise ValueError(f"found two models, {args.model} and {args.old_model}: expected -m MODEL alone")
        args.model = args.old_model
    model, _ = load_over_processes(args, "auto")
    given = args.tokens is not None or args.prompt is not None
    tokens = prompt_ids(args, model) if given else default_tokens(model.config)
    write_golden(model, tokens, weights=args.weights, **trace_options(args))
