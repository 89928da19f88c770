"""npllama exercise: write the functions of Llama yourself, and check each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .console import tell
from .options import Commands, add_command

if TYPE_CHECKING:
    from ..learn.exercises import Exercise
    from ..learn.grading import Outcome


def add_parser(commands: Commands) -> None:
    """Declare the command, its actions and their options."""
    p = add_command(commands, "exercise", run, "write functions yourself, from softmax to the KV cache, and check each")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="list the exercises")
    action = actions.add_parser("start", help="write a file to fill in for each exercise; existing files are kept")
    action.add_argument("folder", type=Path, metavar="DIR", help="the folder to write the files to")
    action = actions.add_parser("check", help="compare your functions with npllama's own, and name common mistakes")
    action.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="your files (default: this folder)")
    action.add_argument("names", nargs="*", metavar="NAME", help="only these exercises")


def run(args: argparse.Namespace) -> int:
    """List the exercises, write their files, or check them; return 1 if a check fails."""
    return {"list": list_all, "start": start, "check": check}[args.action](args)


def list_all(args: argparse.Namespace) -> int:
    """Print a line for each exercise."""
    from ..learn.exercises import EXERCISES

    for number, exercise in enumerate(EXERCISES, start=1):
        print(f"{number:>2}  {exercise.name:<17} {exercise.summary}")
    return 0


def start(args: argparse.Namespace) -> int:
    """Write the files that don't exist yet."""
    from ..learn import grading
    from ..learn.exercises import EXERCISES

    written = grading.start(args.folder)
    kept = len(EXERCISES) - len(written)
    print(f"{args.folder}: {len(written)} files written" + (f", {kept} existing ones kept" if kept else ""))
    return 0


def check(args: argparse.Namespace) -> int:
    """Check all exercises of a folder, or those given by name."""
    from ..learn import grading
    from ..learn.exercises import EXERCISES, find

    folder, names = args.folder, args.names
    if not folder.exists() and str(folder) in (exercise.name for exercise in EXERCISES):
        folder, names = Path(), [str(folder), *names]  # `check softmax rms_norm`, inside the folder
    chosen = [find(name) for name in names] or EXERCISES
    if not any((folder / grading.file_name(exercise)).is_file() for exercise in EXERCISES):
        raise ValueError(f"{folder} holds no exercises: expected the files that `npllama exercise start DIR` writes")
    outcomes = [print_outcome(folder, exercise) for exercise in chosen]
    n_passed = sum(outcome.passed for outcome in outcomes)
    if len(chosen) > 1:
        tell(f"{n_passed} of {len(chosen)} done")
    return 0 if n_passed == len(chosen) else 1


def print_outcome(folder: Path, exercise: Exercise) -> Outcome:
    """Check an exercise and print its errors. Ctrl-C ends an endless loop, and its line is named."""
    from ..learn import grading

    try:
        outcome = grading.check(folder, exercise)
    except KeyboardInterrupt as error:
        line = grading.where(error, folder / grading.file_name(exercise))
        print(f"npllama exercise: {exercise.name} interrupted{line}: is there a loop without an end?", file=sys.stderr)
        raise
    for line in grading.lines(exercise, outcome):
        tell(line)
    return outcome
