"""npllama verify: check every file of a model directory against its recorded hash."""

from __future__ import annotations

import argparse

from ..checkpoint import demo_path, verify
from .console import tell
from .options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "verify", run, "check every file of a model directory against its recorded hash")
    p.add_argument("model", nargs="?", metavar="MODEL", help="model directory or name (default: the embedded demo model)")


def run(args: argparse.Namespace) -> int:
    """Print a line for each problem; return 1 if there are any."""
    path = demo_path() if args.model is None else args.model
    problems = verify(path)
    for problem in problems:
        tell(problem)
    if not problems:
        tell(f"{path}: every file matches its recorded hash")
    return 1 if problems else 0
