"""npllama explain: write an interactive page that shows a forward pass."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..engine.memory import size_text
from .options import Commands, add_command, add_model_options, lesson_ids, load_model, token_ids


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "explain", run, "write an interactive page, one HTML file, that shows a forward pass")
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="text")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="PAGE.html", help="the file to write")
    add_model_options(p)


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its size."""
    from ..learn.explain import explain

    if args.prompt is not None and args.tokens is not None:
        raise ValueError("expected a prompt, or --tokens instead of it")
    model = load_model(args)
    size = explain(model, lesson_ids(args, model), args.out)
    print(f"{args.out}: {size_text(size)}", file=sys.stderr)
