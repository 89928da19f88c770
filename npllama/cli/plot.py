"""npllama plot: draw a figure of a forward pass."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_command, add_model_options, add_prompt_options, lesson_ids, load_model

PLOTS = ["rope", "attention", "mask", "residual", "logit-lens", "tokens", "error"]


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "plot", run, "draw a figure of a forward pass")
    p.add_argument("kind", metavar="KIND", choices=PLOTS, help="rope, attention, mask, residual, logit-lens, tokens or error")
    p.add_argument(
        "traces",
        nargs="*",
        type=Path,
        default=[],  # else argparse reports TRACE as missing along with KIND
        metavar="TRACE",
        help="for KIND error: REFERENCE and CANDIDATE, or a JSON report of compare",
    )
    add_prompt_options(p, required=False)
    p.add_argument("--layer", type=int, default=0, metavar="N", help="default 0")
    p.add_argument("--head", type=int, default=0, metavar="N", help="default 0")
    p.add_argument("-o", "--out", type=Path, metavar="FILE.png|FILE.svg", help="default: a window")
    add_model_options(p)


def run(args: argparse.Namespace) -> None:
    """Draw a figure into a file or a window."""
    from ..learn import plot

    if args.kind == "error":
        from ..golden.compare import compare
        from ..golden.compare.report import as_dict

        if len(args.traces) not in (1, 2):
            raise ValueError("error draws a comparison: expected REFERENCE and CANDIDATE, or one JSON report of compare")
        if len(args.traces) == 1:
            found = plot.read_report(args.traces[0])
        else:
            found = as_dict(compare(*args.traces, model=args.model))
        plot.plot_error(found, args.out)
        return
    if args.traces:
        raise ValueError(f"{args.kind} draws a prompt, not {args.traces[0]}: expected --prompt or --tokens")
    model = load_model(args)
    plot.plot(args.kind, plot.Subject(model, lesson_ids(args, model), args.layer, args.head), args.out)
