"""Measure the rows of the table: each function measures one model, or one kind of work, and returns comparisons."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from npllama import Config, n_parameters
from npllama.checkpoint import demo_path, open_model
from npllama.checkpoint.store import locate
from npllama.engine.layout import new_bytes
from npllama.engine.memory import available_memory
from npllama.engine.threads import available_cpus
from npllama.evaluate.profile import LARGE

from . import conversion, models
from .processes import ROOT, THREADS, Ask, Worker, alternate, mpiexec
from .sums import NUMBERS
from .worker import PRODUCTS

OURS, HF, LLAMA_CPP, NAIVE, LIMIT = "npllama", "Hugging Face", "llama.cpp", "naive NumPy", "limit"
TORCH_BF16, TORCH_AVX512 = "torch bfloat16", "torch bfloat16, AVX-512 without bf16"
MPICH = "MPICH"
INT8 = "npllama int8"
INT4 = "npllama int4"
READ_BYTES = PRODUCTS * LARGE[0] * LARGE[1] * 4  # by the command `bandwidth`
ONE = "one thread"  # a kind of worker
OTHER_PYTHON = "threads of --python"  # another
ALONE = "its matrix products alone"  # in BLAS, as one runs them by hand: what is left of the limit by their sizes
LOOKUP = 8  # tokens proposed


@dataclass
class Line:
    """One comparison. `limit` is the machine's limit, in the unit of ours and theirs."""

    row: str
    work: str
    unit: str
    ours: float
    peer: str = ""
    theirs: float | None = None
    wanted: float | None = None  # ours over theirs, at least; at most where less is better
    limit: float | None = None
    wanted_share: float | None = None  # of the limit, at least; or ours itself, at most, where nothing is compared
    less_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    @property
    def share(self) -> float | None:
        return self.ours / self.limit if self.limit else None

    @property
    def met(self) -> bool | None:
        """Return whether the goals are met; None if there is none."""
        checks = [(self.ratio, self.wanted, self.less_is_better), (self.share, self.wanted_share, self.less_is_better)]
        known = [found <= wanted if less else found >= wanted for found, wanted, less in checks if None not in (found, wanted)]
        return all(known) if known else None


@dataclass
class Bench:
    """The folder of the models and the packages that are installed; `points` collects the data of the plots.

    python  another interpreter, measured in the row `processes`: a free-threaded one, for example
    """

    folder: Path
    quick: bool = False
    most_rounds: int = 1 << 30
    python: str | None = None
    points: list[dict[str, object]] = field(default_factory=list)

    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    has_llama_cpp = all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf"))

    def shape(self, config: Config) -> Config:
        """Return the config itself, or with --quick a tiny one in its place."""
        return replace(models.TINY, tied_embeddings=config.tied_embeddings) if self.quick else config

    def name(self, title: str) -> str:
        """Return how a line of the table calls a shape, which with --quick is a toy."""
        return f"toy {title}" if self.quick else title

    def unless_quick(self, *others: str) -> tuple[str, ...]:
        """Return the others; none with --quick, where other rows run them in the same way and importing torch takes long."""
        return () if self.quick else others

    def rounds(self, n: int) -> int:
        return min(n, self.most_rounds)

    def square(self) -> str:
        return "sgemm 512" if self.quick else "sgemm 4096"

    def model(self, config: Config, dtype: str, sparse: bool = False) -> str:
        """Return the directory of this shape, written on first use."""
        kind = "-tied" * config.tied_embeddings + "-sparse" * sparse
        path = self.folder / f"{config.dim}x{config.n_layers}-{dtype}{kind}"
        return str(path if path.exists() else models.write(path, config, dtype, sparse))

    @contextlib.contextmanager
    def workers(self, kinds: Mapping[str, tuple[str, ...]], n_ranks: int = 1) -> Iterator[dict[str, Worker]]:
        """Start the workers that name -> (kind, path, dtype) lists; those whose packages are absent are left out.

        They start at the same time, since importing torch takes most of it.
        """
        started = {}
        with contextlib.ExitStack() as stack:
            for name, (kind, path, dtype) in kinds.items():
                if (kind == "torch" and not self.has_torch) or (kind == "llamacpp" and not self.has_llama_cpp):
                    continue
                if kind == "llamacpp":
                    worker = Worker(path, module="benchmarks.llamacpp")
                else:
                    changed = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"} if name == TORCH_AVX512 else {}
                    if kind == ONE:
                        kind, changed = "npllama", dict.fromkeys(THREADS, "1")
                    launcher = [mpiexec(), "-n", str(n_ranks)] if kind == "mpi" else []
                    python = sys.executable
                    if kind == OTHER_PYTHON:
                        kind, python = "npllama", self.python
                    worker = Worker(kind, path, dtype, environment=changed, launcher=launcher, python=python)
                stack.callback(worker.close)
                started[name] = worker
            yield {name: stack.enter_context(worker) for name, worker in started.items()}

    def point(self, figure: str, series: str, x: float, y: float) -> None:
        self.points.append({"figure": figure, "series": series, "x": x, "y": y})


def compared(
    row: str, work: str, unit: str, rates: Mapping[str, float], limit: float | None = None,
    wanted: Mapping[str, float] | None = None,
) -> list[Line]:  # fmt: skip
    """Return a line for each of the others, ours against it; only the first has the goal for the share of the limit."""
    wanted = wanted or {}
    others = [name for name in rates if name != OURS]
    lines = [Line(row, work, unit, rates[OURS], name, rates[name], wanted.get(name), limit) for name in others]
    lines = lines or [Line(row, work, unit, rates[OURS], limit=limit)]
    lines[0].wanted_share = wanted.get(LIMIT)
    return lines


# ------------------------------------------------------------------------------------------------------ decode and prefill


def dense(
    bench: Bench, row: str, title: str, config: Config, names: tuple[str, ...], n_decode: int, n_prefill: int, rounds: int,
    wanted: Mapping[str, Mapping[str, float]], prefill_rounds: int = 7,
) -> list[Line]:  # fmt: skip
    """Measure decode and prefill of a whole model with float32 weights."""
    shape, title = bench.shape(config), bench.name(title)
    path = bench.model(shape, "float32")
    kinds = {OURS: "npllama", HF: "torch", LLAMA_CPP: "llamacpp", NAIVE: "naive", LIMIT: "limit"}
    with bench.workers({name: (kinds[name], path, "float32") for name in (*names, LIMIT)}) as workers:
        steps = {name: min(n_decode, 4) if name == NAIVE else n_decode for name in workers}
        asks = [Ask(LIMIT, "bandwidth"), Ask(LIMIT, square := bench.square())]
        for name in workers:
            if name != LIMIT:
                few = 3 if name == NAIVE else rounds
                asks.append(Ask(name, f"decode {steps[name]}", few))
                if n_prefill:
                    asks.append(Ask(name, f"prefill {n_prefill}", min(few, prefill_rounds)))
        asks += [
            Ask(OURS, f"products 1 {n_decode}"),
            Ask(OURS, f"between {n_decode}"),
            *([Ask(OURS, f"products {n_prefill} 1", prefill_rounds)] if n_prefill else []),
        ]
        found = alternate(workers, asks, bench.rounds(rounds))
        memory = {name: workers[name].ask("memory")["bytes"] for name in (OURS, HF) if name in workers}
    present = [name for name in workers if name != LIMIT]
    bandwidth = READ_BYTES / found[LIMIT, "bandwidth"]
    limit = bandwidth / models.bytes_per_token(shape, 4)
    rates = {name: steps[name] / found[name, f"decode {steps[name]}"] for name in present}
    alone = n_decode / found[OURS, f"products 1 {n_decode}"]
    lines = compared(row, f"decode, float32, {title}", "tokens/s", rates | {ALONE: alone}, limit, wanted.get("decode"))
    between = 1000 * found[OURS, f"between {n_decode}"] / n_decode
    work = f"decode between the products of a token, float32, {title}"
    lines.append(Line(row, work, "ms", between, ALONE, 1000 / alone, less_is_better=True))
    for name, rate in {**rates, "limit, float32": limit}.items():
        bench.point(
            "size", name if "limit" in name or name in (LLAMA_CPP, NAIVE) else f"{name}, float32", n_parameters(shape), rate
        )
    if n_prefill:
        rates = {name: n_prefill / found[name, f"prefill {n_prefill}"] for name in present}
        limit = n_prefill * sgemm_rate(square, found) / models.prefill_flops(shape, n_prefill)
        rates[ALONE] = n_prefill / found[OURS, f"products {n_prefill} 1"]
        lines += compared(row, f"prefill of {n_prefill}, float32, {title}", "tokens/s", rates, limit, wanted.get("prefill"))
    lines += [
        Line(row, f"peak memory, float32, {title}", "MB", memory[OURS] / 1e6, name, memory[name] / 1e6, less_is_better=True)
        for name in memory
        if name != OURS and memory[name]
    ]
    return lines


def smollm2_135m(bench: Bench) -> list[Line]:
    names, wanted = (OURS, HF, LLAMA_CPP, NAIVE), {"decode": {HF: 3, LLAMA_CPP: 1, ALONE: 0.92}, "prefill": {HF: 1, LIMIT: 0.7}}
    return dense(bench, "135m", "SmolLM2-135M", models.SMOLLM2_135M, names, 32, 128 if bench.quick else 512, 7, wanted)


def smollm2_360m(bench: Bench) -> list[Line]:
    names = (OURS, *bench.unless_quick(HF))
    return dense(bench, "360m", "SmolLM2-360M", models.SMOLLM2_360M, names, 16, 0, 5, {})


def tinyllama(bench: Bench) -> list[Line]:
    wanted = {"decode": {HF: 1.2, LLAMA_CPP: 1, LIMIT: 0.92}, "prefill": {HF: 1, LIMIT: 0.8}}
    prompt, names = 128 if bench.quick else 512, (OURS, *bench.unless_quick(HF, LLAMA_CPP))
    lines = dense(bench, "1.1b", "1.1B", models.TINYLLAMA_1B, names, 8, prompt, 5, wanted, prefill_rounds=2)
    return lines + batches(bench, "1.1b", "1.1B", models.TINYLLAMA_1B, 4, 3)


def sgemm_rate(square: str, found: Mapping[tuple[str, str], float]) -> float:
    """Return the operations per second of one large product of square matrices."""
    return 2 * int(square.split()[1]) ** 3 / found[LIMIT, square]


def of_all_layers(few: float, one: float, n_few: int, n_layers: int) -> float:
    """Return the seconds of a pass of n_layers, from those of a few layers and of one, each with the output matrix."""
    return few + (n_layers - n_few) * (few - one) / (n_few - 1)


def llama_3b(bench: Bench) -> list[Line]:
    shape, n_few, n = bench.shape(models.LLAMA_3B), 4, 8
    path = bench.model(replace(shape, n_layers=n_few), "float32")
    kinds = {OURS: "npllama", HF: "torch", LIMIT: "limit"}
    with bench.workers({name: (kinds[name], path, "float32") for name in (OURS, *bench.unless_quick(HF), LIMIT)}) as workers:
        few, one = f"decode {n} {n_few}", f"decode {n} 1"
        names = [name for name in workers if name != LIMIT]
        asks = [Ask(LIMIT, "bandwidth"), *(Ask(name, command) for name in names for command in (few, one))]
        found = alternate(workers, asks, bench.rounds(5))
    limit = READ_BYTES / found[LIMIT, "bandwidth"] / models.bytes_per_token(shape, 4)
    rates = {name: n / of_all_layers(found[name, few], found[name, one], n_few, shape.n_layers) for name in names}
    for name, rate in rates.items():
        bench.point("size", f"{name}, float32", n_parameters(shape), rate)
    bench.point("size", "limit, float32", n_parameters(shape), limit)
    title = f"{bench.name('3B')} ({shape.n_layers} layers from {n_few})"
    return compared("3b", f"decode, float32, {title}", "tokens/s", rates, limit)


def llama_8b(bench: Bench) -> list[Line]:
    """Measure packed storage, memory-mapped and warm, in the shapes of Llama 3 8B: four layers and the output matrix."""
    shape, n_few, n, prompt = bench.shape(models.LLAMA_8B), 4, 4, 64 if bench.quick else 512
    bfloat16, int8, int4 = (bench.model(replace(shape, n_layers=n_few), dtype) for dtype in ("bfloat16", "int8", "int4"))
    kinds = {
        OURS: ("npllama", bfloat16, "stored"),
        INT8: ("npllama", int8, "stored"),
        INT4: ("npllama", int4, "stored"),
        TORCH_BF16: ("torch", bfloat16, "stored"),
        TORCH_AVX512: ("torch", bfloat16, "stored"),
        LIMIT: ("limit", bfloat16, "stored"),
    }
    with bench.workers(kinds) as workers:
        few, one, long = f"decode {n} {n_few}", f"decode {n} 1", f"prefill {prompt} 1"
        names = [name for name in workers if name != LIMIT]
        square = bench.square()
        asks = [Ask(LIMIT, "bandwidth"), *(Ask(name, command) for name in names for command in (few, one))]
        asks += [Ask(LIMIT, square, 3), *(Ask(name, long, 3) for name in names if name not in (INT8, INT4))]
        found = alternate(workers, asks, bench.rounds(5))
    limit = READ_BYTES / found[LIMIT, "bandwidth"] / models.bytes_per_token(shape, 2)
    rates = {name: n / of_all_layers(found[name, few], found[name, one], n_few, shape.n_layers) for name in names}
    narrow = {"int8": rates.pop(INT8), "int4": rates.pop(INT4)}
    names = list(rates)
    for name, rate in rates.items():
        bench.point("size", "npllama, bfloat16" if name == OURS else name, n_parameters(shape), rate)
    for dtype, rate in narrow.items():
        bench.point("size", f"npllama, {dtype}", n_parameters(shape), rate)
    bench.point("size", "limit, bfloat16", n_parameters(shape), limit)
    title = f"{bench.name('8B')} ({shape.n_layers} layers from {n_few})"
    lines = compared("8b", f"decode, bfloat16, {title}", "tokens/s", rates, limit, {TORCH_BF16: 1})
    for dtype, goal in (("int8", 1.3), ("int4", 0.8)):
        lines.append(Line("8b", f"decode, {dtype}, {title}", "tokens/s", narrow[dtype], "npllama bfloat16", rates[OURS], goal))
    prefill = {name: prompt / found[name, long] for name in names}
    limit = prompt * sgemm_rate(square, found) / models.prefill_flops(shape, prompt, 1)
    work = f"prefill of {prompt}, bfloat16, 1 layer of {bench.name('8B')}"
    return lines + compared("8b", work, "tokens/s", prefill, limit, {TORCH_BF16: 4})


def processes(bench: Bench) -> list[Line]:
    """Compare one process per core, which share memory, with the threads of one process."""
    return _ranks(bench, "processes")


def mpi(bench: Bench) -> list[Line]:
    """Compare one process per core, which mpiexec has started, with the threads of one process."""
    if mpiexec() is None:
        print("mpi: left out, mpi4py or its mpiexec is not installed (pip install 'npllama[mpi]')")
        return []
    return _ranks(bench, "mpi")


def _ranks(bench: Bench, kind: str) -> list[Line]:
    """Measure decode with four layers of 8B's widths and the output matrix."""
    shape, n = replace(bench.shape(models.LLAMA_8B), n_layers=4), 4
    n_ranks = min(available_cpus(), shape.n_heads)
    if n_ranks < 2:
        print(f"{kind}: left out, there is one processor")
        return []
    paths = {dtype: bench.model(shape, dtype) for dtype in ("bfloat16", "int8")}
    other = kind == "processes" and bench.python is not None
    kinds = {
        f"{dtype} {of}": (of, path, "stored")
        for dtype, path in paths.items()
        for of in ("npllama", kind, ONE, *([OTHER_PYTHON] if other else []))
    }
    with bench.workers(kinds, n_ranks) as workers:
        found = alternate(workers, [Ask(name, f"decode {n}") for name in workers], bench.rounds(5))
    lines = []
    for dtype in paths:
        rates = [n / found[f"{dtype} {of}", f"decode {n}"] for of in (kind, "npllama", ONE)]
        work = f"decode, {dtype}, 4 layers of {bench.name('8B')}"
        limit = n_ranks * rates[2]  # each process computes in one thread
        ranks = f"{work}, {n_ranks} {'MPI ranks' if kind == 'mpi' else 'processes'}"
        lines.append(Line(kind, ranks, "tokens/s", rates[0], "one process's threads", rates[1], 1.45, limit))
        if other:
            rate = n / found[f"{dtype} {OTHER_PYTHON}", f"decode {n}"]
            threads = f"{work}, threads of {version_of(bench.python)}"
            lines.append(Line(kind, threads, "tokens/s", rate, "one process's threads", rates[1], limit=limit))
    return lines


VERSION = """
import platform, sys
import numpy
import npllama.tokenizer
free = not getattr(sys, "_is_gil_enabled", lambda: True)()
print(f"Python {platform.python_version()}{', free-threaded' if free else ''}, NumPy {numpy.__version__}")
"""


def version_of(python: str) -> str:
    """Return an interpreter's version, that of its NumPy, and whether its threads run without a lock."""
    done = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def sums(bench: Bench) -> list[Line]:
    """Measure the sum that two ranks compute twice in each layer: over shared memory, and over MPI where it is installed."""
    if available_cpus() < 2:
        print("sums: left out, there is one processor")
        return []
    launchers: dict[str, list[str]] = {OURS: []}
    if (launcher := mpiexec()) is not None:
        launchers[MPICH] = [launcher, "-n", "2"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in launchers}
    for _ in range(bench.rounds(5)):
        for name, launcher in launchers.items():
            command = [*launcher, sys.executable, "-m", "benchmarks.sums"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            found[name].append(json.loads(done.stdout))
    lines = []
    for figure, when in (("together", "both arrive at once"), ("late", "the other is 3 ms late")):
        times = {name: 1e6 * statistics.median(each[figure] for each in of) for name, of in found.items()}
        work = f"one sum of {NUMBERS:,} float32 by 2 ranks, {when}"
        lines += [replace(line, less_is_better=True) for line in compared("sums", work, "µs", times)]
    return lines


def whole_8b(bench: Bench) -> list[Line]:
    """Measure all 16 GB, warm: in sparse files, whose zeros the system caches as it does any file's content."""
    shape = bench.shape(models.LLAMA_8B)
    n_bytes = 2 * n_parameters(shape)
    if available_memory() < 1.15 * n_bytes:
        print(f"8b-whole: left out, {n_bytes / 1e9:.0f} GB don't fit in the free {available_memory() / 1e9:.0f} GB")
        return []
    path = bench.model(shape, "bfloat16", sparse=True)
    with bench.workers({OURS: ("npllama", path, "stored"), LIMIT: ("limit", path, "stored")}) as workers:
        peak = workers[OURS].peak_anonymous("decode 1")  # and everything is in memory afterwards
        found = alternate(workers, [Ask(LIMIT, "bandwidth"), Ask(OURS, "decode 2")], bench.rounds(5))
    limit = READ_BYTES / found[LIMIT, "bandwidth"] / models.bytes_per_token(shape, 2)
    title = f"{bench.name('8B')} whole"
    lines = [Line("8b-whole", f"decode, bfloat16, {title}, of zeros", "tokens/s", 2 / found[OURS, "decode 2"], limit=limit)]
    return lines + most("8b-whole", f"peak anonymous memory, {title}", "MB", peak and peak / 1e6, 1500)


def most(row: str, work: str, unit: str, found: float | None, allowed: float) -> list[Line]:
    """Return the line of a figure that has a ceiling; nothing where it couldn't be measured."""
    if found is None:
        return []
    return [Line(row, work, unit, found, "at most", allowed, 1.0, less_is_better=True)]


# ---------------------------------------------------------------------------------------------------- batches and contexts


def batches(bench: Bench, row: str, title: str, config: Config, n: int, rounds: int) -> list[Line]:
    path, sizes = bench.model(bench.shape(config), "float32"), (1, 2, 4, 8, 16)
    with bench.workers({OURS: ("npllama", path, "float32")}) as workers:
        found = alternate(workers, [Ask(OURS, f"batch {size} {n}") for size in sizes], bench.rounds(rounds))
    rates = {size: size * n / found[OURS, f"batch {size} {n}"] for size in sizes}
    wanted, title = {8: 2.5}, bench.name(title)
    return [
        Line(row, f"decode, {n} at once, float32, {title}", "tokens/s", rates[n], "one sequence", rates[1], wanted.get(n))
        for n in sizes[1:]
    ]


def batch(bench: Bench) -> list[Line]:
    return batches(bench, "batch", "SmolLM2-135M", models.SMOLLM2_135M, 8, 5)


def context(bench: Bench) -> list[Line]:
    """Measure a token's time by the number of tokens in the cache."""
    shape, n = bench.shape(models.SMOLLM2_135M), 4
    path = bench.model(shape, "float32")
    lengths = (16, 256) if bench.quick else (16, 256, 512, 1024, 2048, 4096, 8000)
    with bench.workers({OURS: ("npllama", path, "float32"), HF: ("torch", path, "float32")}) as workers:
        asks = [Ask(name, f"context {length} {n}") for length in lengths for name in workers]
        found = alternate(workers, asks, bench.rounds(5))
    lines = []
    for length in lengths:
        rates = {name: n / found[name, f"context {length} {n}"] for name in workers}
        for name, rate in rates.items():
            bench.point("context", f"{name}, float32", length, 1000 / rate)
        title = bench.name("SmolLM2-135M")
        lines += compared("context", f"decode after {length:,} tokens, float32, {title}", "tokens/s", rates)
    return lines


def prompt_memory(bench: Bench) -> list[Line]:
    """Measure anonymous memory until the first token, without weights and cache; with the interpreter and its libraries."""
    config = bench.shape(models.SMOLLM2_135M)
    path = bench.model(config, "float32")
    lengths = (256, 512) if bench.quick else (1024, 2048, 4096)
    per_token = 2 * 4 * config.n_layers * config.n_kv_heads * config.head_dim
    weights = {OURS: new_bytes(open_model(path).params, config, np.float32), HF: 4 * n_parameters(config)}
    lines = []
    for length in lengths:
        peaks = {}
        kinds = {OURS: ("npllama", path, "float32"), HF: ("torch", path, "float32")}
        with bench.workers(kinds if length == lengths[-1] else {OURS: kinds[OURS]}) as workers:
            for name, worker in workers.items():
                if peak := worker.peak_anonymous(f"prefill {length}"):
                    peaks[name] = (peak - weights[name] - per_token * length) / 1e6
        work = f"memory above weights and cache, prompt of {length:,}, {bench.name('SmolLM2-135M')}"
        if OURS in peaks:
            lines += most("prompt-memory", work, "MB", peaks[OURS], 300)
        if HF in peaks:
            lines.append(Line("prompt-memory", work, "MB", peaks[OURS], HF, peaks[HF], less_is_better=True))
    return lines


# --------------------------------------------------------------------------------------------------- opening and converting

OPEN = """
import sys, time
import npllama
from npllama import checkpoint
started = time.perf_counter()
checkpoint.open_model(sys.argv[1]) if sys.argv[2] == "open" else npllama.load(sys.argv[1], "stored")
print(time.perf_counter() - started, flush=True)
"""


def opening(bench: Bench) -> list[Line]:
    """Measure opening an 8B directory of sparse files, of which opening reads only the headers."""
    path = bench.model(bench.shape(models.LLAMA_8B), "bfloat16", sparse=True)

    def seconds(what: str) -> float:
        command = [sys.executable, "-c", OPEN, path, what]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(bench.rounds(5))]
        return statistics.median(float(run.stdout) for run in runs)

    return [
        *most("opening", f"opening a directory of {bench.name('8B')}: open_model()", "s", seconds("open"), 0.5),
        *most("opening", "the same: load(dtype='stored')", "s", seconds("load"), 0.5),
    ]


COLD = """
import sys, time
from pathlib import Path
import npllama
started = time.perf_counter()
if sys.argv[2] == "read":
    piece = bytearray(1 << 23)
    for name in sys.argv[3:]:
        with open(name, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass
else:
    model = npllama.load(sys.argv[1], "stored")
    npllama.forward(model.params, model.config, [1], last_only=True)
print(time.perf_counter() - started, flush=True)
"""


def cold(bench: Bench) -> list[Line]:
    """Measure opening and a first token with no file in memory, against reading the files; each time in a new process."""
    if not hasattr(os, "posix_fadvise"):
        print("cold: left out, this system can't drop a file from its cache")
        return []
    path = bench.model(bench.shape(models.TINYLLAMA_1B), "bfloat16")
    files = sorted(str(file) for file in Path(path).rglob("*.npy"))

    def seconds(what: str, forgotten: bool = True) -> float:
        for file in files if forgotten else ():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())  # pages that aren't on the disk yet can't be dropped
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [sys.executable, "-c", COLD, path, what, *files]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)

    rounds = [(seconds("read"), seconds("token"), seconds("token", forgotten=False)) for _ in range(bench.rounds(5))]
    read, token, warm = map(statistics.median, zip(*rounds, strict=True))
    work = f"opening and a first token, bfloat16, {bench.name('1.1B')}"
    return [
        Line("cold", f"{work}, from the disk", "s", token, "reading the files", read, less_is_better=True),
        Line("cold", f"{work}, from the disk", "s", token, "the same, warm", warm, less_is_better=True),
    ]


def widening(bench: Bench) -> list[Line]:
    """Measure load(dtype="float32") of bfloat16 that is in memory, against np.copy of as many bytes."""
    lines = []
    for title, config in (("SmolLM2-360M", models.SMOLLM2_360M), ("1.1B", models.TINYLLAMA_1B)):
        shape = bench.shape(config)
        path, n = bench.model(shape, "bfloat16"), n_parameters(shape)
        with bench.workers({OURS: ("npllama", path, "float32"), LIMIT: ("limit", path, "float32")}) as workers:
            asks = [Ask(OURS, "load"), Ask(LIMIT, f"copy {4 * n}"), Ask(LIMIT, f"copy {2 * n}")]
            found = alternate(workers, asks, bench.rounds(3))
        work, ours = f"widening bfloat16 to float32, {bench.name(title)}", found[OURS, "load"]
        wide, packed = found[LIMIT, f"copy {4 * n}"], found[LIMIT, f"copy {2 * n}"]
        lines.append(Line("widening", work, "s", ours, "np.copy, its float32 bytes", wide, 2, less_is_better=True))
        lines.append(Line("widening", work, "s", ours, "np.copy, its bfloat16 bytes", packed, less_is_better=True))
    return lines


def converting(bench: Bench) -> list[Line]:
    if not bench.has_torch:
        print("conversion: left out, torch is not installed")
        return []
    found = conversion.run(bench.quick)
    work = f"conversion of {found['checkpoint_bytes'] / 1e9:.1f} GB"
    peak = found["peak_anonymous_bytes"]
    line = Line("conversion", work, "s", found["seconds"], "cp and sync", found["cp_seconds"], 2.5, less_is_better=True)
    return [line, *most("conversion", "peak anonymous memory of it", "MB", peak and peak / 1e6, 1500)]


# ------------------------------------------------------------------------------------------------------------------- lookup


def lookup(bench: Bench) -> list[Line]:
    """Measure greedy decoding of a text that repeats its prompt: of SmolLM2 where it was fetched, else the embedded model."""
    path = _smollm2() if not bench.quick else None
    n = 16 if bench.quick else 72  # about as long as the text that it repeats
    with bench.workers({OURS: ("npllama", str(path or demo_path()), "float32")}) as workers:
        plain, by_lookup = f"generate 0 {n}", f"generate {LOOKUP} {n}"
        same = workers[OURS].ask(plain)["tokens"] == workers[OURS].ask(by_lookup)["tokens"]
        found = alternate(workers, [Ask(OURS, plain), Ask(OURS, by_lookup)], bench.rounds(5))
    title = "SmolLM2-135M" if path else "the embedded model"
    work = f"a text that repeats its prompt, --lookup {LOOKUP}, {title}, {'the same' if same else 'OTHER'} tokens"
    return [Line("lookup", work, "tokens/s", n / found[OURS, by_lookup], "without", n / found[OURS, plain], 1.5)]


def _smollm2() -> Path | None:
    """Return the directory of SmolLM2-135M-Instruct that `npllama fetch smollm2-135m` made; None without one."""
    homes = [os.environ.get("NPLLAMA_TEST_MODELS")]
    places = [Path(home) / "models" / "smollm2-135m" for home in homes if home] + [locate("smollm2-135m")]
    return next((place for place in places if (place / "manifest.json").is_file()), None)


ROWS: dict[str, Callable[[Bench], list[Line]]] = {
    "135m": smollm2_135m,
    "batch": batch,
    "context": context,
    "prompt-memory": prompt_memory,
    "lookup": lookup,
    "360m": smollm2_360m,
    "1.1b": tinyllama,
    "widening": widening,
    "3b": llama_3b,
    "8b": llama_8b,
    "processes": processes,
    "mpi": mpi,
    "sums": sums,
    "opening": opening,
    "cold": cold,
    "8b-whole": whole_8b,
    "conversion": converting,
}
