"""npllama run: convert a checkpoint of any format into the store, and chat with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..checkpoint.store import locate
from . import chat
from .options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "run", run, "chat with a checkpoint of any format, which is converted into the store once")
    p.add_argument(
        "model", metavar="FILE_OR_NAME", help="a source for convert, a name of `npllama models`, or a model directory"
    )
    chat.add_options(p)


def run(args: argparse.Namespace) -> None:
    """Find, fetch or convert the model, then chat."""
    args.model = str(prepared(args.model))
    chat.run(args)


def prepared(name: str) -> Path:
    """Return the model directory of a file, folder or name; convert or fetch it if it doesn't exist yet."""
    if not name.startswith("hf:"):
        path = locate(name)
        if (path / "manifest.json").is_file():
            return path
        from npllama_convert.registry import REGISTRY

        if not path.exists() and name in REGISTRY:
            from npllama_convert.fetch import fetch

            return fetch(name, report)
        name = str(path)
    from npllama_convert.stored import stored

    return stored(name, report)


def report(line: str) -> None:
    """Print a line on standard error: it isn't part of the conversation."""
    print(line, file=sys.stderr, flush=True)
