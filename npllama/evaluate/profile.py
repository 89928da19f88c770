"""Measure where the time of a token goes: each matrix product, named by its weight, each operation, and the memory's limit.

    profile = Profile(npllama.load())
    for step in profile.watch(generate_steps(profile.model, ids, 64, Sampling(), cache=profile.cache())):
        ...
    print(profile.text())

A Profile times the operations and the cache of a pass without a tap. (The rounding profiles of golden.precision are something
else: they say how a port rounds.)
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..cache import KVCache
from ..checkpoint import Model
from ..engine.weights import Weight
from ..generation import Step
from ..model import FAST

TIMED = [field.name for field in dataclasses.fields(FAST) if getattr(FAST, field.name) and field.name != "feed_forward"]
LARGE = (16384, 4096)  # float32: 268 MB, beyond every cache


class Profile:
    """Add up the time of each operation from the second token on: the first includes the prompt.

    model  the model to generate with: the given one with its operations timed
    """

    def __init__(self, model: Model):
        self.bytes_per_token = sum(
            weight.nbytes
            for name, weight in model.params.items()
            if weight.ndim == 2 and (model.config.tied_embeddings or name != "tok_embeddings.weight")
        )
        self.n_tokens, self.seconds = 0, 0.0
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.read: defaultdict[str, int] = defaultdict(int)
        self._names = _names(model)
        self.model = copy.copy(model)
        self.model.ops = dataclasses.replace(FAST, **{name: self._timed(getattr(FAST, name), name) for name in TIMED})

    def cache(self) -> KVCache:
        """Return an empty cache whose updates are timed."""
        return _TimedCache(self)

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the steps, and time each after the first."""
        steps = iter(steps)
        for first in steps:
            yield first
            break
        self.spent.clear()
        self.read.clear()
        while True:
            started = time.perf_counter()
            step = next(steps, None)
            if step is None:
                return
            self.seconds += time.perf_counter() - started
            self.n_tokens += 1
            yield step

    def text(self) -> str:
        """Return a table: for each operation its milliseconds per token, its share, and how fast it read weights."""
        if not self.n_tokens:
            return "time per operation: not measured, as no token was generated after the first"
        ms = 1000 / self.n_tokens
        bandwidth = memory_bandwidth()
        rows = sorted(self.spent.items(), key=lambda item: -item[1])
        rows.append(("the rest: Python, residual additions", self.seconds - sum(self.spent.values())))
        lines = [f"{f'mean of {self.n_tokens:,} tokens':<32} {'ms':>8} {'share':>7} {'GB/s':>7}"]
        for name, seconds in rows:
            speed = f"{self.read[name] / seconds / 1e9:7.1f}" if self.read.get(name) else ""
            lines.append(f"{name:<32} {seconds * ms:8.2f} {seconds / self.seconds:7.1%} {speed}".rstrip())
        limit = self.bytes_per_token / bandwidth
        share = limit * self.n_tokens / self.seconds
        lines.append(f"{'all':<32} {self.seconds * ms:8.2f}")
        lines.append(
            f"memory-bandwidth limit: {self.bytes_per_token / 1e6:,.0f} MB of weights per token at {bandwidth / 1e9:.1f} GB/s "
            f"(one large matrix-vector product) take {limit * 1000:.2f} ms, {share:.0%} of the total"
        )
        return "\n".join(lines)

    def _timed(self, function: Callable, name: str) -> Callable:
        """Return the function, its time added up under its name, or under that of the weights it multiplies by."""

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            seconds = time.perf_counter() - started
            key, n_bytes = self._product(*args) if name in ("linear", "linears") else (name, 0)
            self.spent[key] += seconds
            if n_bytes:
                self.read[key] += n_bytes
            return result

        return timed

    def _product(self, x: np.ndarray, *weights: Weight) -> tuple[str, int]:
        first, *others = (self._names.get(id(weight), "linear") for weight in weights)
        return " ".join([first, *(name.rsplit(".", 1)[-1] for name in others)]), sum(weight.nbytes for weight in weights)


class _TimedCache(KVCache):
    def __init__(self, profile: Profile):
        super().__init__(profile.model.config)
        self._timed_update = profile._timed(super().update, "cache")

    def update(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._timed_update(layer, k, v)


def _names(model: Model) -> dict[int, str]:
    """Map id(weight) to its name in the table: without `.weight`, and the same in all layers."""
    names = {id(weight): re.sub(r"^layers\.\d+\.|\.weight$", "", name) for name, weight in model.params.items()}
    return names | {id(model.params["tok_embeddings.weight"]): "output"} if model.config.tied_embeddings else names


def memory_bandwidth() -> float:
    """Measure the bytes per second that a large float32 matrix-vector product reads: the best of five, after a warm-up."""
    matrix, x = np.ones(LARGE, np.float32), np.ones(LARGE[1], np.float32)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        matrix @ x
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds[1:])
