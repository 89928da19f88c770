"""npllama verify: hash every file of a model directory again."""

from __future__ import annotations

import argparse

from ..checkpoint import demo_path, verify
from .console import tell
from .options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "verify", run, "hash every file of a model directory again")
    p.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded demo model")


def run(args: argparse.Namespace) -> int:
    """Print each problem on a line; return 1 if there is one."""
    path = demo_path() if args.model is None else args.model
    problems = verify(path)
    for problem in problems:
        tell(problem)
    if not problems:
        tell(f"{path}: every file is as it was written")
    return 1 if problems else 0
