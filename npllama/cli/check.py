"""npllama check: compare a published model's output with known answers."""

from __future__ import annotations

import argparse

from .console import tell
from .options import Commands, add_command, add_compute_options, load_model, stored_tensors


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(
        commands, "check", run, "recognise a published model by its shape, and check its output against known answers"
    )
    p.add_argument("model", metavar="MODEL", help="model directory or name")
    add_compute_options(p)


def run(args: argparse.Namespace) -> int:
    """Print a line for each finding; return 1 unless all hold."""
    from ..evaluate import known_answers

    model = load_model(args)
    known = known_answers.recognise(model.config)
    stored = sorted({tensor["dtype"] for tensor in stored_tensors(model)})
    tell(f"{model.path} has the shape of {known.name}; its weights are stored as {' and '.join(stored)}")
    failed = 0
    for answer in known.answers:
        tell(f"{answer.prompt!r}, as known from {answer.source}")
        for finding in known_answers.check(model, answer):
            verdict = "ok    " if finding.holds else "FAILED"
            tell(f"  {verdict}  {finding.what}" + (f": {finding.found}" if finding.found else ""))
            failed += not finding.holds
    return 1 if failed else 0
