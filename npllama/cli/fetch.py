"""npllama fetch: download a model and convert it into the store."""

from __future__ import annotations

import argparse
import sys

from .options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "fetch", run, "download and convert a model, to be used by its name: -m NAME")
    p.add_argument("name", metavar="NAME", help="a name that `npllama models` lists")


def run(args: argparse.Namespace) -> None:
    """Download a model of the registry into the store."""
    from npllama_convert.fetch import fetch

    try:
        fetch(args.name)
    except KeyboardInterrupt:
        print("npllama fetch: interrupted: nothing is kept, the next run starts again", file=sys.stderr)
        raise
