"""Where a token's time goes: each product of matrices by its weight, each operation, and what the memory's speed allows.

The functions that model.py calls are timed from outside while a profile is watching; model.py knows nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

import numpy as np

from . import fast, linear, model, ops
from .cache import KVCache
from .checkpoint import Model
from .generation import Step
from .layout import groups
from .linear import Int8, Weight

LARGE = (16384, 4096)  # float32: 268 MB, beyond every cache


class Profile:
    """Adds up what generating takes, from the second token on: the first comes with the prompt."""

    def __init__(self, model: Model):
        self.bytes_per_token = sum(
            weight.nbytes
            for name, weight in model.params.items()
            if weight.ndim == 2 and (model.config.tied_embeddings or name != "tok_embeddings.weight")
        )
        self.n_tokens, self.seconds = 0, 0.0
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.read: defaultdict[str, int] = defaultdict(int)
        self._labels = _labels(model)

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass the steps on, and time what is called to make each."""
        steps = iter(steps)
        with self._watching():
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
        """A table: milliseconds a token and share of each operation, and how fast weights were read."""
        if not self.n_tokens:
            return "profile: no token after the first was made"
        ms = 1000 / self.n_tokens
        bandwidth = memory_bandwidth()
        rows = sorted(self.spent.items(), key=lambda item: -item[1])
        rows.append(("the rest: Python, residual sums", self.seconds - sum(self.spent.values())))
        lines = [f"{'a token of ' + format(self.n_tokens, ','):<32} {'ms':>8} {'share':>7} {'GB/s':>7}"]
        for name, seconds in rows:
            speed = f"{self.read[name] / seconds / 1e9:7.1f}" if self.read.get(name) else ""
            lines.append(f"{name:<32} {seconds * ms:8.2f} {seconds / self.seconds:7.1%} {speed}".rstrip())
        limit = self.bytes_per_token / bandwidth
        share = limit * self.n_tokens / self.seconds
        lines.append(f"{'all':<32} {self.seconds * ms:8.2f}")
        lines.append(
            f"the memory's limit: {self.bytes_per_token / 1e6:,.0f} MB of weights a token at {bandwidth / 1e9:.1f} GB/s "
            f"(one large matrix-vector product) take {limit * 1000:.2f} ms, {share:.0%} of it all"
        )
        return "\n".join(lines)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        operations = ["rms_norm", "rope", "rope_rotation", "rope_frequencies", "causal_mask", "swiglu"]
        places: list[tuple[ModuleType | type, str, Callable[..., str]]] = [
            *((ops, name, lambda *a, name=name: name) for name in operations),
            (fast, "attention", lambda *a: "attention"),
            (KVCache, "update", lambda *a: "cache"),
            (model, "embed", lambda *a: "embedding"),
            (model, "linear", self._label),
            (linear, "linear", self._label),
        ]
        before = [getattr(place, name) for place, name, _ in places]
        for (place, name, label), function in zip(places, before, strict=True):
            setattr(place, name, self._timed(function, label))
        try:
            yield
        finally:
            for (place, name, _), function in zip(places, before, strict=True):
                setattr(place, name, function)

    def _timed(self, function: Callable, label: Callable[..., str]) -> Callable:
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - started
            name = label(*args)
            self.spent[name] += seconds
            if label == self._label:
                self.read[name] += args[1].nbytes
            return result

        return timed

    def _label(self, x: np.ndarray, weight: Weight) -> str:
        return self._labels.get((_address(weight), weight.shape), "linear")


def _labels(model: Model) -> dict[tuple[int, tuple[int, ...]], str]:
    """(address, shape) -> what a product with this weight is called; the layers' together, and matrices that lie as one."""
    labels = {}
    for names in groups(model.config):
        weights = [model.params[name] for name in names]
        short = [name.removesuffix(".weight") for name in names]
        if names[0].startswith("layers."):
            short = [name.split(".", 2)[2] for name in short]
        whole = (sum(weight.shape[0] for weight in weights), weights[0].shape[-1])
        for weight, name in zip(weights, short, strict=True):
            labels[_address(weight), weight.shape] = name
        if len(weights) > 1:
            kind = short[0].rsplit(".", 1)[0]
            labels[_address(weights[0]), whole] = f"{kind}.{' '.join(name.rsplit('.', 1)[1] for name in short)}"
        if names == ("tok_embeddings.weight",) and model.config.tied_embeddings:
            labels[_address(weights[0]), weights[0].shape] = "output"
    return labels


def _address(weight: Weight) -> int:
    array = weight.values if isinstance(weight, Int8) else weight
    return array.__array_interface__["data"][0]


def memory_bandwidth() -> float:
    """Bytes a second that one large float32 matrix-vector product reads; the best of five, after one that isn't counted."""
    matrix, x = np.ones(LARGE, np.float32), np.ones(LARGE[1], np.float32)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        matrix @ x
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds[1:])
