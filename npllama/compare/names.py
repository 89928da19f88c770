"""The names of activations: their order of computation, their axes, and which axis counts the tokens."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

# name -> axes in the dimension key of model.py, in the order of their computation; a batch adds B in front.
BEFORE = {"tok_embeddings": "T D"}
LAYER = {
    "attention_norm": "T D",
    "attention.q": "T H K",
    "attention.k": "T G K",
    "attention.v": "T G K",
    "attention.q_rope": "T H K",
    "attention.k_rope": "T G K",
    "attention.scores": "H T S",
    "attention.weights": "H T S",
    "attention.heads": "T H K",
    "attention.out": "T D",
    "attention_residual": "T D",
    "ffn_norm": "T D",
    "feed_forward.gate": "T F",
    "feed_forward.up": "T F",
    "feed_forward.act": "T F",
    "feed_forward.out": "T D",
    "out": "T D",
}
AFTER = {"norm": "T D", "logits": "T V"}
# What each is computed from in its own layer; Place.inputs() adds what is from the layer before.
SOURCES = {
    "attention.q": ("attention_norm",),
    "attention.k": ("attention_norm",),
    "attention.v": ("attention_norm",),
    "attention.q_rope": ("attention.q",),
    "attention.k_rope": ("attention.k",),
    "attention.scores": ("attention.q_rope", "attention.k_rope"),
    "attention.weights": ("attention.scores",),
    "attention.heads": ("attention.weights", "attention.v"),
    "attention.out": ("attention.heads",),
    "attention_residual": ("attention.out",),
    "ffn_norm": ("attention_residual",),
    "feed_forward.gate": ("ffn_norm",),
    "feed_forward.up": ("ffn_norm",),
    "feed_forward.act": ("feed_forward.gate", "feed_forward.up"),
    "feed_forward.out": ("feed_forward.act",),
    "out": ("attention_residual", "feed_forward.out"),
    "logits": ("norm",),
}
CACHED = ("attention.k_rope", "attention.v")  # those of earlier passes are inputs as well
_NAME = re.compile(r"(?:step\.(\d{1,6})/)?(?:layers\.(\d{1,6})\.)?(.*)", re.DOTALL)  # any text is a name
_KINDS = [*BEFORE, *LAYER, *AFTER]


class Place(NamedTuple):
    """Where in the computation a name stands: `step.1/layers.3.attention.q` is step 1, layer 3, kind attention.q."""

    step: int | None  # None in the prompt
    layer: int | None  # None before and after the layers
    kind: str

    @property
    def prefix(self) -> str:
        """`step.1/`, or nothing in the prompt."""
        return "" if self.step is None else f"step.{self.step}/"

    @property
    def axes(self) -> list[str] | None:
        """The axes of one sequence's array; None for a name that is not one of forward()'s."""
        axes = (BEFORE | AFTER if self.layer is None else LAYER).get(self.kind)
        return axes.split() if axes else None

    def sibling(self, kind: str) -> str:
        """The name of another activation of the same step, and of the same layer if it is one of a layer's."""
        return self.prefix + (f"layers.{self.layer}." if kind in LAYER else "") + kind

    def inputs(self, n_layers: int) -> list[str]:
        """The names of the activations that this one is computed from, those of earlier passes in the cache included."""
        sources = SOURCES.get(self.kind, ())
        names = [self.sibling(kind) for kind in sources]
        for step in [] if self.step is None else [None, *range(self.step)]:
            names += [Place(step, self.layer, self.kind).sibling(kind) for kind in sources if kind in CACHED]
        if self.kind in ("attention_norm", "attention_residual"):
            names.append(self.prefix + (f"layers.{self.layer - 1}.out" if self.layer else "tok_embeddings"))
        if self.kind == "norm":
            names.append(f"{self.prefix}layers.{n_layers - 1}.out")
        return names


def place(name: str) -> Place:
    """Read a name; one that isn't forward()'s is all kind."""
    step, layer, kind = _NAME.fullmatch(name).groups()
    found = Place(None if step is None else int(step), None if layer is None else int(layer), kind)
    return found if found.axes else Place(None, None, name)


def in_order(names) -> list[str]:
    """Names in the order of their computation; those that aren't forward()'s come last, as they came."""

    def key(name: str) -> tuple[float, ...]:
        step, layer, kind = here = place(name)
        if here.axes is None:
            return (float("inf"),)
        stage = 0 if kind in BEFORE and layer is None else 1 if layer is not None else 2
        return (-1 if step is None else step, stage, layer or 0, _KINDS.index(kind))

    return sorted(names, key=key)


def dimensions(arrays) -> dict[str, int]:
    """The size of each dimension, from the shapes of a prompt's activations.    name -> array; T and S are left out"""
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        axes = place(name).axes
        if axes and len(axes) <= x.ndim <= len(axes) + 1:
            sizes |= {a: n for a, n in zip(reversed(axes), reversed(x.shape), strict=False) if a not in "TS"}
    return sizes


def by_token(name: str, x: np.ndarray) -> np.ndarray:
    """One row per token, everything else in it: the unit in which errors are measured.    [..., T, numbers]

    An array whose name or shape isn't forward()'s is one row.
    """
    axes = place(name).axes
    if axes is None or not len(axes) <= x.ndim <= len(axes) + 1:
        return x.reshape(1, -1)
    batch = x.ndim - len(axes)
    x = np.moveaxis(x, batch + axes.index("T"), batch)
    return x.reshape(*x.shape[: batch + 1], math.prod(x.shape[batch + 1 :]))
