"""Measure the time and the anonymous memory of `npllama convert`, on 4 GB of random weights in two shards.

By itself: python -m benchmarks.conversion [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .processes import watch

# Nine of the 32 layers of Llama 2 7B.
PARAMS = {"dim": 4096, "n_layers": 9, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
VOCABULARY, SHARDS = 32000, 2

MAKE = """
import json, sys
from pathlib import Path
import torch
from npllama.config import parameter_shapes
from npllama_convert.meta import resolve
folder, vocabulary, shards = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
params = json.loads((folder / "params.json").read_text())
pool = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
for shard in range(shards):
    state = {}
    for i, (name, shape) in enumerate(parameter_shapes(resolve(params, vocab_size=vocabulary, report=len)).items()):
        shape = list(shape)
        if len(shape) == 2:
            by_columns = name.endswith(("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight"))
            shape[1 if by_columns else 0] //= shards
            i = i * shards + shard
        n = torch.Size(shape).numel()
        state[name] = pool.roll(i).repeat(-(-n // len(pool)))[:n].reshape(shape).clone()
    torch.save(state, folder / f"consolidated.{shard:02d}.pth")
"""
CONVERT = "import sys; from npllama_convert.sources import convert; convert(*sys.argv[1:3])"


def run_watched(command: list[str]) -> tuple[float, float, int | None]:
    """Run a command; return seconds, processor seconds and its peak anonymous memory in bytes (Linux; without mapped files)."""
    before = os.times()
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = watch(process.pid, lambda: process.poll() is None)
    if process.returncode:
        raise RuntimeError(f"{command[:2]} ended with status {process.returncode}")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, processor, peak


def copy_and_sync(src: Path, dst: Path) -> float:
    started = time.perf_counter()
    dst.mkdir()
    for file in src.iterdir():
        subprocess.run(["cp", str(file), str(dst)], check=True)
        with open(dst / file.name, "rb+") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - started


def run(quick: bool = False) -> dict[str, object]:
    """Make a checkpoint, convert it and copy it alternately, print the figures. Needs torch, and 9 GB of disk (quick: 0.7)."""
    params, rounds = PARAMS | ({"dim": 1024, "n_heads": 16, "n_layers": 2} if quick else {}), 1 if quick else 3
    with tempfile.TemporaryDirectory(prefix="npllama-conversion-") as name:
        folder = Path(name)
        src = folder / "checkpoint"
        src.mkdir()
        (src / "params.json").write_text(json.dumps(params))
        subprocess.run([sys.executable, "-c", MAKE, str(src), str(VOCABULARY), str(SHARDS)], check=True)
        n_bytes = sum(file.stat().st_size for file in src.iterdir())
        conversions, copies = [], []
        for _ in range(rounds):
            os.sync()
            conversions.append(run_watched([sys.executable, "-c", CONVERT, str(src), str(folder / "model")]))
            shutil.rmtree(folder / "model")
            os.sync()
            copies.append(copy_and_sync(src, folder / "copy"))
            shutil.rmtree(folder / "copy")
    seconds, processor = (statistics.median(values) for values in list(zip(*conversions, strict=True))[:2])
    peak = max((peak for _, _, peak in conversions if peak is not None), default=None)
    cp_seconds = statistics.median(copies)
    result = {
        "checkpoint_bytes": n_bytes,
        "shards": SHARDS,
        "rounds": rounds,
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "gigabytes_per_second": round(n_bytes / seconds / 1e9, 3),
        "cp_seconds": round(cp_seconds, 2),
        "times_cp": round(seconds / cp_seconds, 2),
        "peak_anonymous_bytes": peak,
    }
    shown = "not measured (needs /proc)" if peak is None else f"{peak / 1e6:.0f} MB"
    print(f"conversion of {n_bytes / 1e9:.2f} GB of bfloat16 in {SHARDS} shards")
    print(f"  time, torch's import included  {seconds:8.1f} s    {n_bytes / seconds / 1e9:.2f} GB/s")
    print(f"  processor time                 {processor:8.1f} s")
    print(f"  cp and sync of the same files  {cp_seconds:8.1f} s    {seconds / cp_seconds:.1f} times as long")
    print(f"  peak anonymous memory          {shown:>10}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, to see that it runs")
    print(json.dumps(run(parser.parse_args().quick)))
