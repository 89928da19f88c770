"""Measure everything on this machine:  python -m benchmarks [--quick] [--json FILE]

Prints tables and writes JSON. Needs nothing running beside it. torch is measured too where it and transformers are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from . import conversion, inference, storage


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    packages = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, under two minutes")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), metavar="FILE", help="default: benchmarks.json")
    args = parser.parse_args()
    # These slow a current NumPy down; they are meant for old builds of OpenBLAS.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    result: dict[str, object] = {"machine": machine(), "quick": args.quick}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    result["inference"] = inference.run(args.quick)
    result["storage"] = storage.run(args.quick)
    if importlib.util.find_spec("torch"):
        print()
        result["conversion"] = conversion.run(args.quick)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
