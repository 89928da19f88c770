"""npllama tokenize: convert text to ids, or back."""

from __future__ import annotations

import argparse

from .console import read_text
from .options import Commands, add_command, add_tokenizer_option, token_ids, tokenizer_of


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "tokenize", run, "convert text to ids on one line, or back")
    p.add_argument("text", nargs="?", help="- reads standard input")
    p.add_argument("--bos", action="store_true", help="put the BOS token first")
    p.add_argument("--special", action="store_true", help="parse the spelling of special tokens as these tokens")
    p.add_argument("--pieces", action="store_true", help="print a line per token: its id and its piece")
    p.add_argument("--decode", type=token_ids, metavar="1,2,3", help="convert ids to text")
    add_tokenizer_option(p)


def run(args: argparse.Namespace) -> None:
    """Print the ids of a text, the text of ids, or the piece of each."""
    if (args.text is None) == (args.decode is None):
        raise ValueError("expected a text, or --decode instead of it")
    tokenizer = tokenizer_of(args.model)
    if args.decode is None:
        ids = tokenizer.encode(read_text("-") if args.text == "-" else args.text, bos=args.bos, special=args.special)
    else:
        ids = [tokenizer.checked(id) for id in args.decode]
    if args.pieces:
        for id in ids:
            print(f"{id:>7}  {tokenizer.piece(id)}")
    elif args.decode is None:
        print(",".join(map(str, ids)))
    else:
        print(tokenizer.decode(ids))
