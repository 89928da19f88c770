"""Run one implementation in a process of its own, with its own memory and threads: reads commands, answers in JSON.

    python -m benchmarks.worker npllama|processes|mpi|naive|torch|limit MODEL_DIRECTORY DTYPE

DTYPE is float32 (weights are widened) or stored. It answers `{"seconds": ...}` when the first logits are computed, then a line
for each line on standard input: a command and its numbers.

| command | what is timed |
|---|---|
| prefill N [LAYERS] | a prompt of N tokens |
| decode N [LAYERS] | N tokens, one by one, after a prompt of 16; of the first LAYERS layers, if said, and the output matrix |
| batch B N | N steps of B sequences |
| context S N | N tokens, one by one, after S others |
| products T N | N times what the matrix products of a pass of T tokens take by themselves, in NumPy's BLAS |
| between N | N tokens, one by one, after a prompt of 16, without the time of their matrix products |
| load | opening the directory again |
| bandwidth, sgemm N, copy BYTES | limit only: large matrix-vector products (PRODUCTS), one of N×N matrices, np.copy |
| generate K N | N greedy tokens that repeat their prompt, with --lookup K; the answer has the tokens |
| memory | nothing: {"bytes": peak of the resident size, "anonymous": now} |
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import npllama
from npllama.checkpoint import open_model
from npllama.checkpoint.reading import load_over
from npllama.engine.ranks import mpi
from npllama.engine.ranks.following import follow_world
from npllama.engine.threads import available_cpus
from npllama.evaluate.profile import LARGE
from npllama.generation import prefill
from npllama.model import FAST

from . import naive
from .processes import anonymous_memory

PROMPT = 16  # tokens before a decode
PRODUCTS = 8
TEXT = (
    "Lily had a red ball. She took the ball to the park and threw it high in the air. A big dog ran up and took the ball in "
    "his mouth. Lily was sad and sat down under a tree. The dog came back and put the ball at her feet. Lily laughed and said "
    "thank you, and from that day on the two of them played in the park every morning until it was time to go home."
)
Run = Callable[[], object]


class Npllama:
    def __init__(self, path: str, dtype: str):
        self.path, self.dtype = path, dtype
        self.model = npllama.load(path, dtype)
        self.config = self.model.config

    def prefill(self, n: int, n_layers: int | None = None) -> Run:
        model = self._of(n_layers)
        return lambda: prefill(model, self._tokens(n), npllama.KVCache(model.config))

    def decode(self, n: int, n_layers: int | None = None) -> Run:
        model = self._of(n_layers)
        cache = npllama.KVCache(model.config)
        prefill(model, self._tokens(PROMPT), cache)
        return lambda: self._steps(model, cache, n)

    def batch(self, size: int, n: int) -> Run:
        cache = npllama.KVCache(self.config, (size,))
        prefill(self.model, np.tile(self._tokens(PROMPT), (size, 1)), cache)
        return lambda: self._steps(self.model, cache, n)

    def context(self, length: int, n: int) -> Run:
        """Fill the cache with random numbers: computing them takes long, and would not change the time to read them."""
        cache, config = npllama.KVCache(self.config), self.config
        cache.extend(np.full(length, True))
        k = np.random.default_rng(0).standard_normal((length, config.n_kv_heads, config.head_dim), dtype=np.float32)
        for layer in range(config.n_layers):
            cache.update(layer, k, k)
        cache.commit()
        self._steps(self.model, cache, 1)  # it grows
        return lambda: self._steps(self.model, cache, n)

    def generate(self, lookup: int, n: int) -> Run:
        """Continue a text followed by its own beginning; the answer has the tokens."""
        encode = self.model.tokenizer.encode
        ids = encode(f"{TEXT}\n\n{TEXT[: TEXT.index('.') + 1]}", bos=True)
        return lambda: list(npllama.generate(self.model, ids, n, stop_ids=[], lookup=lookup))

    def products(self, n_rows: int, n: int) -> Run:
        """Multiply each layer's matrices by n_rows rows, the output matrix by one, as for a prompt; float32 weights only."""
        params, ones = self.model.params, functools.partial(np.ones, dtype=np.float32)
        layers = [w for name, w in params.items() if name.startswith("layers.") and w.ndim == 2]
        output = params.get("output.weight", params["tok_embeddings.weight"])
        pairs = [(w, ones((w.shape[1], n_rows)) if n_rows > 1 else ones(w.shape[1])) for w in layers]
        pairs.append((output, ones(output.shape[1])))

        def run() -> None:
            for _ in range(n):
                for weight, x in pairs:
                    weight @ x

        return run

    def between(self, n: int) -> Run:
        """Return the seconds of n tokens that no matrix product takes: those of Python and of all other operations."""
        cache, spent = npllama.KVCache(self.config), 0.0
        prefill(self.model, self._tokens(PROMPT), cache)

        def timed(product: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object) -> object:
                nonlocal spent
                started = time.perf_counter()
                y = product(*args)
                spent += time.perf_counter() - started
                return y

            return call

        ops = replace(FAST, linear=timed(FAST.linear), linears=timed(FAST.linears))

        def run() -> float:
            started = time.perf_counter()
            for i in range(n):
                npllama.forward(self.model.params, self.config, [i % self.config.vocab_size], cache, last_only=True, ops=ops)
            return time.perf_counter() - started - spent

        return run

    def load(self) -> Run:
        self.model = None
        return lambda: setattr(self, "model", npllama.load(self.path, self.dtype))

    def _of(self, n_layers: int | None) -> npllama.Model:
        return replace(self.model, config=replace(self.config, n_layers=n_layers or self.config.n_layers))

    def _tokens(self, n: int) -> np.ndarray:
        return np.arange(n) % self.config.vocab_size

    def _steps(self, model: npllama.Model, cache: npllama.KVCache, n: int) -> None:
        for i in range(n):
            tokens = np.full((*cache.batch_shape, 1), i % self.config.vocab_size)
            npllama.forward(model.params, model.config, tokens, cache, last_only=True)


class Naive:
    def __init__(self, path: str, dtype: str):
        self.model = npllama.load(path, dtype)
        self.params = {name: np.ascontiguousarray(weight) for name, weight in self.model.params.items()}

    def prefill(self, n: int) -> Run:
        return lambda: self._forward(np.arange(n), {}, 0)

    def decode(self, n: int) -> Run:
        cache: naive.Cache = {}
        self._forward(np.arange(PROMPT), cache, 0)

        def run() -> None:
            for i in range(n):
                self._forward(np.array([i]), cache, PROMPT + i)

        return run

    def _forward(self, tokens: np.ndarray, cache: naive.Cache, start: int) -> None:
        naive.forward(self.params, self.model.config, tokens % self.model.config.vocab_size, cache, start)


class Limit:
    """The speed of NumPy's BLAS and of the memory, without a model."""

    def __init__(self, path: str, dtype: str):
        self.matrix, self.x = np.ones(LARGE, np.float32), np.ones(LARGE[1], np.float32)
        self.squares: dict[int, np.ndarray] = {}

    def prefill(self, n: int) -> Run:
        return self.bandwidth()

    def bandwidth(self) -> Run:
        """Multiply often enough that waking a thread takes no part of the time."""

        def run() -> None:
            for _ in range(PRODUCTS):
                self.matrix @ self.x

        return run

    def sgemm(self, n: int) -> Run:
        square = self.squares.setdefault(n, np.ones((n, n), np.float32))
        return lambda: square @ square

    def copy(self, n_bytes: int) -> Run:
        source = np.ones(n_bytes, np.uint8)
        np.copy(source)  # into memory that the system, or a virtual machine's host, first has to find; `load` has its own again
        return lambda: np.copy(source)


def torch_model(path: str, dtype: str) -> object:
    from .huggingface import HuggingFace

    return HuggingFace(path, dtype)


class Processes(Npllama):
    """One process per core."""

    def __init__(self, path: str, dtype: str):
        self.path, self.dtype = path, dtype
        self.config = open_model(path).config
        self.model = npllama.load(path, dtype, processes=min(available_cpus(), self.config.n_heads))


class Mpi(Npllama):
    """One process per core, as rank 0 of those that mpiexec has started."""

    def __init__(self, path: str, dtype: str):
        self.path, self.dtype = path, dtype
        self.model = load_over(path, dtype, mpi.world())
        self.config = self.model.config


KINDS = {"npllama": Npllama, "processes": Processes, "mpi": Mpi, "naive": Naive, "limit": Limit, "torch": torch_model}


def peak_memory() -> int | None:
    """Return the process's peak resident size so far, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answer the commands on standard input; as another rank than 0, follow that one."""
    kind, path, dtype = sys.argv[1:]
    group = mpi.world() if kind == "mpi" else None
    if group is None:
        serve(kind, path, dtype)
    elif group.rank:
        follow_world(group)
    else:
        serve(kind, path, dtype)
        group.close()


def serve(kind: str, path: str, dtype: str) -> None:
    """Answer the commands on standard input."""
    started = time.perf_counter()
    implementation = KINDS[kind](path, dtype)
    implementation.prefill(PROMPT)()
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "memory":
            answer = {"bytes": peak_memory(), "anonymous": anonymous_memory(os.getpid())}
        else:
            run = getattr(implementation, command)(*map(int, numbers))  # its preparation is not timed
            started = time.perf_counter()
            made = run()
            answer = {"seconds": time.perf_counter() - started}
            if isinstance(made, float):  # a part of that time
                answer["seconds"] = made
            if isinstance(made, list):
                answer["tokens"] = made
            del run, made
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
