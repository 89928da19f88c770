"""Parse the names of activations, order them as they are computed, and cut arrays into tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ...activations import BEFORE, STREAM, TABLE, TOKENS, Activation, stream_before

_NAME = re.compile(r"(?:step\.(\d{1,6})/)?(?:layers\.(\d{1,6})\.)?(.*)", re.DOTALL)  # any text is a name
_ORDER = {kind: i for i, kind in enumerate(TABLE)}


class Place(NamedTuple):
    """Place of a name in the computation: `step.1/layers.3.attention.q` is step 1, layer 3, kind attention.q."""

    step: int | None  # None in the prompt
    layer: int | None  # None before and after the layers
    kind: str

    @property
    def prefix(self) -> str:
        """Return the names' prefix: `step.1/`, or nothing for the prompt."""
        return "" if self.step is None else f"step.{self.step}/"

    @property
    def row(self) -> Activation | None:
        """Return its row of the activation table; None for a name that is not one of forward()'s."""
        row = TABLE.get(self.kind)
        return row if row is not None and row.in_layer == (self.layer is not None) else None

    @property
    def axes(self) -> str | None:
        """Return the axes of one sequence's array; None for a name that is not one of forward()'s."""
        return self.row.axes if self.row else None

    def sibling(self, kind: str) -> str:
        """Return the name of another activation of the same step, and of the same layer if it is one of a layer's."""
        return self.prefix + TABLE[kind].full_name(self.layer)

    def inputs(self, n_layers: int) -> list[str]:
        """Return the names of the activations that this one is computed from, those of earlier passes in the cache included."""
        if self.row is None:
            return []
        stream = self.prefix + stream_before(n_layers if self.layer is None else self.layer)
        names = [stream if kind == STREAM else self.sibling(kind) for kind in self.row.inputs if kind != TOKENS]
        if self.row.slots:
            passes = [None] if self.step is None else [None, *range(self.step + 1)]
            names += [self._replace(step=step).sibling(self.row.slots) for step in passes]
        return names


def place(name: str) -> Place:
    """Read a name; one that isn't forward()'s is all kind."""
    match = _NAME.fullmatch(name)
    step, layer, kind = match.groups() if match else (None, None, name)
    found = Place(None if step is None else int(step), None if layer is None else int(layer), kind)
    return found if found.axes else Place(None, None, name)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names in the order of their computation; those that aren't forward()'s come last, in their own order."""

    def key(name: str) -> tuple[float, ...]:
        step, layer, kind = here = place(name)
        if here.row is None:
            return (math.inf,)
        outside = -1 if here.row in BEFORE else math.inf
        return (-1 if step is None else step, outside if layer is None else layer, _ORDER[kind])

    return sorted(names, key=key)


def dimensions(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Find the size of each dimension from the shapes of a prompt's activations.    name -> array; T and S are left out"""
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        axes = place(name).axes
        if axes and len(axes) <= x.ndim <= len(axes) + 1:
            sizes |= {a: n for a, n in zip(reversed(axes), reversed(x.shape), strict=False) if a not in "TS"}
    return sizes


def by_token(name: str, x: np.ndarray) -> np.ndarray:
    """Reshape to one row per token: the unit in which errors are measured.    [..., T, numbers]

    An array whose name or shape isn't forward()'s is one row.
    """
    axes = place(name).axes
    if axes is None or not len(axes) <= x.ndim <= len(axes) + 1:
        return x.reshape(1, -1)
    batch = x.ndim - len(axes)
    x = np.moveaxis(x, batch + axes.index("T"), batch)
    return x.reshape(*x.shape[: batch + 1], math.prod(x.shape[batch + 1 :]))
