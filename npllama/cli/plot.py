"""npllama plot: draw a figure of a forward pass."""

from __future__ import annotations

import argparse
import re
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
    p.add_argument("--head", type=heads, default=(0,), metavar="N", help="default 0; attention: also 1,2 or all")
    p.add_argument("--position", type=int, metavar="N", help="rope: the token that is rotated, default the last")
    p.add_argument("--size", type=size, metavar="WxH", help="pixels, such as 1280x720; default 1600 wide and as high as needed")
    p.add_argument("--font", type=float, metavar="PIXELS", help="size of the text; default 14 at 1280x720, in proportion")
    p.add_argument("-o", "--out", type=Path, metavar="FILE.png|FILE.svg", help="default: a window")
    add_model_options(p)


def heads(text: str) -> tuple[int, ...] | None:
    """Read 1,2 as heads 1 and 2, and all as None."""
    if text == "all":
        return None
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a head, several such as 1,2, or all, not {text!r}") from None


def size(text: str) -> tuple[int, int]:
    """Read 1280x720."""
    if match := re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, such as 1280x720, not {text!r}")


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
        plot.plot_error(found, args.out, args.size, args.font)
        return
    if args.traces:
        raise ValueError(f"{args.kind} draws a prompt, not {args.traces[0]}: expected --prompt or --tokens")
    model = load_model(args)
    subject = plot.Subject(model, lesson_ids(args, model), args.layer, args.head, args.position)
    plot.plot(args.kind, subject, args.out, args.size, args.font)
