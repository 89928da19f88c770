"""npllama walkthrough: follow a prompt through the model."""

from __future__ import annotations

import argparse

from .options import Commands, add_command, add_model_options, load_model, prompt_ids, token_ids
from .walkthrough_tokenizer import print_lesson, tokenizer_steps


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "walkthrough", run, "follow a prompt through the model, step by step")
    p.add_argument("prompt", nargs="?", help="text; - reads standard input")
    p.add_argument("--tokens", type=token_ids, metavar="1,2,3", help="a prompt of ids; needs no tokenizer")
    p.add_argument("--layer", type=int, metavar="N", help="the layer to show in detail (default 0)")
    p.add_argument("--head", type=int, metavar="N", help="the query head to show in detail (default 0)")
    p.add_argument("--tokenizer", action="store_true", help="the old name of `npllama walkthrough-tokenizer`")
    p.add_argument("--compare", action="append", default=[], metavar="MODEL", help=argparse.SUPPRESS)  # with --tokenizer
    p.add_argument("--markdown", action="store_true", help="print Markdown")
    add_model_options(p)


def run(args: argparse.Namespace) -> None:
    """Print the lesson about a forward pass."""
    if args.tokenizer:
        if args.tokens is not None:
            raise ValueError("--tokenizer takes a text, not --tokens")
        if (args.layer, args.head) != (None, None):
            raise ValueError("--tokenizer shows no forward pass: expected neither --layer nor --head with it")
        print_lesson(tokenizer_steps(args.prompt, args.model, args.compare), args.markdown)
        return
    if args.compare:
        raise ValueError("--compare compares tokenizers: expected --tokenizer with it")
    if (args.prompt is None) == (args.tokens is None):
        raise ValueError("expected a prompt, or --tokens instead of it")
    from ..learn.walkthrough import walkthrough

    model = load_model(args)
    print_lesson(walkthrough(model, prompt_ids(args, model), args.layer or 0, args.head or 0), args.markdown)
