"""npllama walkthrough-tokenizer: follow a text through the tokenizer."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import in_colour, write
from .options import Commands, add_command, add_tokenizer_option, tokenizer_of

if TYPE_CHECKING:
    from ..learn.lesson import Step


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "walkthrough-tokenizer", run, "follow a text through the tokenizer: split, merges, ids")
    p.add_argument("text", nargs="?", help="a sentence (default: one that shows everything)")
    p.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="MODEL",
        help="compare with the tokenizer of this model or file; repeatable",
    )
    p.add_argument("--markdown", action="store_true", help="print Markdown")
    add_tokenizer_option(p)


def run(args: argparse.Namespace) -> None:
    """Print the lesson about the tokenizer."""
    print_lesson(tokenizer_steps(args.text, args.model, args.compare), args.markdown)


def tokenizer_steps(text: str | None, model: str | None, others: Sequence[str]) -> list[Step]:
    """Return the lesson about a text in a model's tokenizer, compared with the tokenizers of `others`."""
    from ..learn import tokenizer_lesson

    compared = [tokenizer_of(path) for path in others]
    return tokenizer_lesson.tokenizer_lesson(tokenizer_of(model), tokenizer_lesson.SENTENCE if text is None else text, compared)


def print_lesson(steps: Sequence[Step], markdown: bool) -> None:
    """Print a lesson as Markdown, or as text in the terminal's width."""
    from ..learn import lesson

    if markdown:
        write(lesson.markdown(steps))
    else:
        write(lesson.text(steps, min(max(80, shutil.get_terminal_size().columns), 100), in_colour()))
