"""npllama conformance: test vectors for other implementations."""

from __future__ import annotations

import argparse

from .console import tell
from .options import Commands, Parser, add_command


def add_parser(commands: Commands) -> None:
    """Declare the command, its three subcommands and their options."""
    p = add_command(commands, "conformance", run, "export test vectors for implementations in any language, and grade results")
    parts = p.add_subparsers(dest="part", required=True, metavar="export|check|run")
    p = _add(parts, "export", "write the vectors: a folder per case, plain arrays and a case.json")
    p.add_argument("out", metavar="DIR", help="the directory to write")
    p.add_argument(
        "--format", choices=["raw", "npy", "safetensors"], default="raw", help="file format of the arrays (default: raw)"
    )
    p.add_argument("--force", action="store_true", help="replace existing vectors")
    p = _add(parts, "check", "grade the results that a port wrote, under the same paths as the vectors")
    p.add_argument("results", metavar="RESULTS", help="the directory that your program wrote")
    p.add_argument("--vectors", metavar="DIR", help="the exported vectors (default: those of this version)")
    _add_grading(p)
    p = _add(parts, "run", "call the functions of a Python file, which have the operations' names and signatures")
    p.add_argument("--python", metavar="FILE.py", required=True, help="the file with your functions")
    _add_grading(p)


def _add(parts: Commands, name: str, summary: str) -> Parser:
    p = parts.add_parser(name, help=summary, description=summary)
    p.add_argument("--level", metavar="L0,L1", help="only these levels (default: all)")
    return p


def _add_grading(p: Parser) -> None:
    p.add_argument(
        "--profile",
        default="float32",
        metavar="P",
        help="the port's rounding profile: float32 (default), float64, bfloat16, float16, float16-cache or int8-activations",
    )
    p.add_argument(
        "--report", action="append", default=[], metavar="FILE", help="write the full result, x.json or x.html; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Export vectors, or print the verdict and the failures; return 1 if a case failed."""
    from ..golden.conformance import check, export, run
    from ..golden.conformance.report import text, write_report
    from ..golden.conformance.suite import levels_of

    levels = levels_of(args.level)
    if args.part == "export":
        files = export(args.out, levels, args.format, args.force)
        n_cases = sum(file.endswith("case.json") for file in files)
        tell(f"{args.out}: {n_cases} cases of {', '.join(levels)}; see its README.md")
        return 0
    if args.part == "check":
        report = check(args.results, args.vectors, args.profile, levels)
    else:
        report = run(args.python, args.profile, levels)
    for path in args.report:
        write_report(report, path)
    tell(text(report))
    return report.exit_status
