"""Measure everything on this machine:  python -m benchmarks [--quick] [--only ROW ...] [--json FILE] [--plot FILE]

Prints npllama's figures, those of others and the machine's limit in a table, and writes JSON. Nothing else should run
meanwhile. Hugging Face on torch, and llama.cpp, are measured where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from npllama.engine.memory import available_memory
from npllama.engine.threads import available_cpus, controls_blas

from . import storage
from .processes import prepare_environment
from .rows import ROWS, Bench, Line

PACKAGES = ("threadpoolctl", "torch", "transformers", "xllamacpp")


def machine(n_threads: int) -> dict[str, object]:
    """Return the description of the machine and the packages."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split() for line in lines if line.startswith("flags"))
        cpu += "".join(f" {flag}" for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "cpus": available_cpus(),
        "threads": n_threads,
        "free_memory": available_memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{name: version(name) if importlib.util.find_spec(name) else None for name in PACKAGES},
    }


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown, aligned for a terminal."""
    head = ("work", "", "npllama", "theirs", "", "ratio", "wanted", "limit", "share", "wanted", "")
    rows = [head, tuple("---" for _ in head)]
    for line in lines:
        sign = "at most" if line.less_is_better else "at least"
        share = f"{line.share:.2f}" if line.share else ""
        ratio = f"{line.ratio:.2f}" if line.ratio else ""
        wanted, wanted_share = (f"{sign} {x:g}" if x else "" for x in (line.wanted, line.wanted_share))
        verdict = {True: "met", False: "not met", None: ""}[line.met]
        if line.peer == "at most":
            ratio = wanted = ""
        figures = (number(line.theirs), ratio, wanted, number(line.limit), share, wanted_share, verdict)
        rows.append((line.work, line.unit, number(line.ours), line.peer, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def number(x: float | None) -> str:
    """Return a number with three significant digits."""
    return "" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy shapes, under two minutes: shows that it runs, not how fast")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*ROWS, "storage"],
        metavar="ROW",
        help=f"measure only these rows of {', '.join(ROWS)}, storage",
    )
    parser.add_argument("--rounds", type=int, default=1 << 30, metavar="N", help="at most N rounds of each measurement")
    parser.add_argument(
        "--threads",
        type=int,
        default=min(2, available_cpus()),
        metavar="N",
        help="threads of each implementation (default: two)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("benchmarks.json"),
        metavar="FILE",
        help="write the results to FILE (default: benchmarks.json)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG; needs matplotlib")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="put the models there, 25 GB (default: the system's temporary folder)"
    )
    parser.add_argument("--python", metavar="FILE", help="another Python, such as a free-threaded one, for the row `processes`")
    args = parser.parse_args()
    for folder in (args.folder or Path(), args.json.parent, (args.plot or args.json).parent):
        if not folder.is_dir():  # reported now rather than at the end
            parser.error(f"{folder} is not a folder")
    if args.python and not shutil.which(args.python):
        parser.error(f"--python {args.python}: found no program, expected a Python")
    prepare_environment(args.threads)
    result: dict[str, object] = {"machine": machine(args.threads), "quick": args.quick, "seconds": {}}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None))
    if not controls_blas():
        print("threadpoolctl doesn't know this BLAS: npllama's own threads stay at one")
    if args.quick:
        print("toy shapes in place of the models: this shows that it runs, not how fast")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="npllama-benchmarks-", dir=args.folder) as folder:
        bench = Bench(Path(folder).resolve(), args.quick, 1 if args.quick else args.rounds, args.python)
        for row, measure in ROWS.items():
            if args.only and row not in args.only:
                continue
            started = time.perf_counter()
            found = [replace(line, wanted=None, wanted_share=None) if args.quick else line for line in measure(bench)]
            result["seconds"][row] = round(time.perf_counter() - started, 1)
            print(f"\n{row}: {result['seconds'][row]} s\n{table(found)}", flush=True)
            lines += found
            result["lines"] = [{**asdict(line), "ratio": line.ratio, "share": line.share, "met": line.met} for line in lines]
            result["points"] = bench.points
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    if not args.only or "storage" in args.only:
        result["storage"] = storage.run(args.quick)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nall\n{table(lines)}\n\nwritten to {args.json}")
    if args.plot:
        draw_plot(bench.points, args.plot)


def draw_plot(points: Sequence[dict[str, object]], file: Path) -> None:
    if not importlib.util.find_spec("matplotlib"):
        print(f"{file} is not drawn: matplotlib is not installed (pip install 'npllama[learn]')")
        return
    from .plots import draw

    draw(points, file)
    print(f"drawn in {file}")


if __name__ == "__main__":
    main()
