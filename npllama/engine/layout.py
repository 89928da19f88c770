"""Lay dense weights out in memory. Reading them is what takes time, and BLAS reads long runs of numbers faster than short ones.

The rows of a matrix with few columns are short: such a matrix is kept transposed, each column in one run.
(SmolLM2-135M has rows of 576 numbers; benchmarks/README.md says what it gains.) Matrices that are multiplied with the same x
are adjacent in memory, to be multiplied as one. linear.py takes a weight in either order; its shape is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from ..config import Config, parameter_shapes
from .threads import parallel
from .weights import Form, SideBySide, Weight, form_of, is_packed

SHORT_ROW = 2048  # numbers
TILE = 1 << 18  # numbers filled in at once


def groups(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield every parameter's name once, in groups that are multiplied with the same x."""
    together = {"wq": ("wq", "wk", "wv"), "w1": ("w1", "w3")}
    for name in parameter_shapes(config):
        *path, leaf, weight = name.split(".")
        if leaf not in ("wk", "wv", "w3"):
            yield tuple(".".join((*path, other, weight)) for other in together.get(leaf, (leaf,)))


def new_bytes(params: Mapping[str, Weight], config: Config, dtype: DTypeLike) -> int:
    """Return how many bytes in_memory() would allocate."""
    n = 0
    for names in groups(config):
        weights = [params[name] for name in names]
        if _transposes(names, weights, config) or any(weight.dtype != dtype for weight in weights):
            n += sum(weight.size for weight in weights)
    return n * np.dtype(dtype).itemsize


def in_memory(params: Mapping[str, Weight], config: Config, dtype: DTypeLike) -> dict[str, Weight]:
    """Return the parameters as dense arrays of this dtype, copied to memory where that makes them faster to read."""
    dense: dict[str, Weight] = {}
    jobs: list[tuple[np.ndarray, Form]] = []
    for names in groups(config):
        weights = [params[name] for name in names]
        sizes = [weight.shape[0] for weight in weights]
        if _transposes(names, weights, config):
            block = np.empty((weights[0].shape[1], sum(sizes)), dtype).T
            targets = SideBySide.of(block, sizes) if len(sizes) > 1 else [block]
        elif any(weight.dtype != dtype for weight in weights):
            targets = [np.empty(weight.shape, dtype) for weight in weights]
        else:
            dense.update(zip(names, weights, strict=True))
            continue
        dense.update(zip(names, targets, strict=True))
        for target, weight in zip(targets, weights, strict=True):
            step = max(1, TILE * len(target) // weight.size)
            parts = (slice(i, i + step) for i in range(0, len(target), step))
            jobs += [(np.asarray(target[part]), form_of(weight).rows(part)) for part in parts]

    def fill(i: int) -> None:
        target, form = jobs[i]
        if is_packed(form) and target.dtype == np.float32 and target.flags.c_contiguous:
            form.widen(target)
        else:
            target[:] = form.widen()

    parallel(fill, len(jobs))
    return {name: dense[name] for name in params}


def _transposes(names: tuple[str, ...], weights: Sequence[Weight], config: Config) -> bool:
    """Return whether the matrices of a group are better kept transposed: their rows are short, and shorter than their columns.

    An embedding that isn't also the output matrix never is: its rows are looked up, not multiplied.
    """
    if weights[0].ndim != 2 or (names == ("tok_embeddings.weight",) and not config.tied_embeddings):
        return False
    return weights[0].shape[1] <= min(SHORT_ROW - 1, sum(weight.shape[0] for weight in weights))
