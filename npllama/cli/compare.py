"""npllama compare: compare a port's activations with a reference's."""

from __future__ import annotations

import argparse

from ..golden.precision import PRECISIONS, PROFILES
from .console import in_colour, tell
from .options import Commands, add_command, add_processes_option, load_over_processes

MAPS = "hf, transformerlens, ggml, mlx-lm, litgpt, meta, keras-hub, torchtune, llama2.c"
MAP_HELP = f"how the candidate names and lays out its activations: {MAPS} or a JSON file"


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    summary = "compare a port's activations with a reference's, and name the first that differs"
    p = add_command(commands, "compare", run, summary)
    activations = "a trace directory, .npz, .safetensors, or a folder of .npy, or of .f32 with a shapes.json"
    p.add_argument("reference", metavar="REFERENCE", help=activations)
    p.add_argument("candidate", metavar="CANDIDATE", help="the same")
    p.add_argument(
        "-m", "--model", metavar="MODEL", help="the model for noise and single operations (default: the reference's own)"
    )
    add_processes_option(p)
    p.add_argument("--map", metavar="hf|ggml|...|FILE", help=MAP_HELP)
    p.add_argument(
        "--noise",
        metavar="DIR",
        help="take the noise floor from a trace of the same tokens in the candidate's precision; --map applies to it too",
    )
    p.add_argument("--precision", choices=PRECISIONS, help="the candidate's precision (default: as in its files)")
    profiles = ", ".join(PROFILES[-7:])
    p.add_argument(
        "--profile",
        metavar="P",
        help=f"the candidate's rounding profile (default: that in its trace.json), for example {profiles}",
    )
    p.add_argument("--partial", action="store_true", help="ignore activations that one side lacks (default: they are failures)")
    p.add_argument("--atol", type=float, metavar="X", help="judge by |c - r| <= atol + rtol * |r| instead of the noise floor")
    p.add_argument("--rtol", type=float, metavar="X", help="the relative part of that bound")
    p.add_argument("--all", action="store_true", help="list every activation, not only those around the first failure")
    p.add_argument(
        "--report", action="append", default=[], metavar="FILE", help="write a report, x.json or x.html; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Print the verdict and the table; return 1 if an activation differs."""
    from ..golden.compare import compare
    from ..golden.compare.report import write_report
    from ..golden.compare.text import text

    comparison = compare(
        args.reference,
        args.candidate,
        names=args.map,
        model=args.model,
        noise=args.noise,
        precision=args.precision,
        profile=args.profile,
        partial=args.partial,
        atol=args.atol,
        rtol=args.rtol,
        open_model=lambda path, dtype: load_over_processes(args, dtype, path)[0],
    )
    for path in args.report:
        write_report(comparison, path)
    tell(text(comparison, args.all, colour=in_colour()))
    return comparison.exit_status
