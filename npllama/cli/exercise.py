"""npllama exercise: functions to write yourself, each checked."""

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
    p = add_command(commands, "exercise", run, "ten functions to write yourself, from softmax to the KV cache, each checked")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="a line for each")
    action = actions.add_parser("start", help="write a file for each, to be filled in; what is there stays")
    action.add_argument("folder", type=Path, metavar="DIR")
    action = actions.add_parser("check", help="compare what you wrote with npllama's own, and name the usual mistakes")
    action.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: the current folder")
    action.add_argument("names", nargs="*", metavar="NAME", help="only these exercises")


def run(args: argparse.Namespace) -> int:
    """List the exercises, write their files, or check them; return 1 unless all that were checked are done."""
    return {"list": list_all, "start": start, "check": check}[args.action](args)


def list_all(args: argparse.Namespace) -> int:
    """Print a line for each exercise."""
    from ..learn.exercises import EXERCISES

    for number, exercise in enumerate(EXERCISES, start=1):
        print(f"{number:>2}  {exercise.name:<17} {exercise.summary}")
    return 0


def start(args: argparse.Namespace) -> int:
    """Write the files that aren't there."""
    from ..learn import grading
    from ..learn.exercises import EXERCISES

    written = grading.start(args.folder)
    kept = len(EXERCISES) - len(written)
    print(f"{args.folder}: {len(written)} files written" + (f", {kept} were there and stay as they are" if kept else ""))
    return 0


def check(args: argparse.Namespace) -> int:
    """Check all exercises of a folder, or those that are named."""
    from ..learn import grading
    from ..learn.exercises import EXERCISES, find

    folder, names = args.folder, args.names
    if not folder.exists() and str(folder) in (exercise.name for exercise in EXERCISES):
        folder, names = Path(), [str(folder), *names]  # `check softmax rms_norm`, inside the folder
    chosen = [find(name) for name in names] or EXERCISES
    if not any((folder / grading.file_name(exercise)).is_file() for exercise in EXERCISES):
        raise ValueError(f"{folder} holds no exercises: expected files that `npllama exercise start DIR` writes")
    outcomes = [print_outcome(folder, exercise) for exercise in chosen]
    n_passed = sum(outcome.passed for outcome in outcomes)
    if len(chosen) > 1:
        tell(f"{n_passed} of {len(chosen)} done")
    return 0 if n_passed == len(chosen) else 1


def print_outcome(folder: Path, exercise: Exercise) -> Outcome:
    """Check an exercise and print what is wrong with it; an endless loop is ended by Ctrl-C, and its line named."""
    from ..learn import grading

    try:
        outcome = grading.check(folder, exercise)
    except KeyboardInterrupt as error:
        line = grading.where(error, folder / grading.file_name(exercise))
        print(f"npllama exercise: {exercise.name} interrupted{line}: is there a loop without an end?", file=sys.stderr)
        raise
    tell(f"{exercise.name:<17} {outcome.line}")
    if outcome.hint:
        tell(f"{'':<17} hint: {outcome.hint}")
    return outcome
