"""Tokens per second and memory of npllama beside Hugging Face on torch, on the same weights, in alternation."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from npllama import Config, checkpoint, n_parameters, parameter_shapes
from npllama.checkpoint import demo_path

# SmolLM2-135M's shape; the weights are random, which takes the same time.
SHAPE_135M = Config(
    dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152, norm_eps=1e-5,
    rope_theta=100000.0, rope_scaling=None, max_seq_len=8192, tied_embeddings=True,
)  # fmt: skip
THEIRS = "torch"


class Worker:
    """benchmarks.worker in a process; `load` is its time from the start to the first logits."""

    def __init__(self, name: str, model: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        self.load = self._answer()["seconds"]

    def ask(self, command: str) -> dict[str, float]:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def write_random_model(path: Path, config: Config) -> None:
    pool = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)
    with checkpoint.create(path, config, "float32", source={"kind": "random"}) as writer:
        for name, shape in parameter_shapes(config).items():
            writer.add(name, np.resize(pool, shape))


def measure(name: str, path: Path, config: Config, n_prefill: int, n_decode: int, rounds: int) -> dict[str, object]:
    names = ["npllama"] + [THEIRS] * all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    workers = {worker: Worker(worker, path) for worker in names}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for command in (f"prefill {n_prefill}", f"decode {n_decode}"):
            for worker in names:
                seconds.setdefault((worker, command.split()[0]), []).append(workers[worker].ask(command)["seconds"])
    result: dict[str, object] = {"model": name, "parameters": n_parameters(config), "rounds": rounds}
    for worker in names:
        memory = workers[worker].ask("memory")["bytes"]
        workers[worker].close()
        result[worker] = {
            "prefill_tokens_per_second": n_prefill / statistics.median(seconds[worker, "prefill"]),
            "decode_tokens_per_second": n_decode / statistics.median(seconds[worker, "decode"]),
            "load_seconds": workers[worker].load,
            "peak_memory_bytes": memory,
        }
    return result


def show(result: dict[str, object]) -> None:
    ours, theirs = result["npllama"], result.get(THEIRS)
    print(f"\n{result['model']}, {result['parameters']:,} parameters, float32")
    print(f"medians of {result['rounds']} rounds, in alternation")
    print(f"  {'':<32}{'npllama':>12}{'torch':>12}{'ratio':>8}")
    rows = (
        ("prefill, tokens/s", "prefill_tokens_per_second", 1.0),
        ("decode, tokens/s", "decode_tokens_per_second", 1.0),
        ("start to first logits, s", "load_seconds", 1.0),
        ("peak memory, MB", "peak_memory_bytes", 1e-6),
    )
    for title, key, unit in rows:
        a, b = (side and side[key] and side[key] * unit for side in (ours, theirs))
        cells = f"{a:>12,.1f}" if a else f"{'-':>12}"
        cells += f"{b:>12,.1f}{a / b:>8.2f}" if a and b else f"{'-':>12}"
        print(f"  {title:<32}{cells}")


def run(quick: bool = False) -> list[dict[str, object]]:
    results = [
        measure("embedded demo model", demo_path(), checkpoint.open_model(demo_path()).config, 128, 64, 3 if quick else 9)
    ]
    show(results[-1])
    if not quick:
        with tempfile.TemporaryDirectory(prefix="npllama-inference-") as folder:
            path = Path(folder) / "model"
            write_random_model(path, SHAPE_135M)
            results.append(measure("SmolLM2-135M's shape, random weights", path, SHAPE_135M, 512, 32, 7))
        show(results[-1])
    return results
