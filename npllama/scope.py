"""The state of one forward pass: its parameters, its cache, its operations and its tap. No mathematics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
from numpy.typing import DTypeLike

from . import ops
from .cache import KVCache
from .config import Config, LinearRopeScaling, RopeScaling
from .engine import linear as engine
from .engine.weights import Weight

Array = np.ndarray
Params = Mapping[str, Weight]
Tap = Callable[[str, Array], Array]


class Linears(Protocol):
    """The type of engine.linears: x, then any number of weights."""

    def __call__(self, x: Array, /, *weights: Weight) -> list[Array]: ...  # noqa: D102


@dataclass(frozen=True)
class Ops:
    """The operations that a pass calls, each with its signature in model.py, linear.py or ops.py.

    dataclasses.replace(model.PLAIN, softmax=mine) returns the set with another softmax. Operations that aren't called have no
    field: replacing one raises TypeError. Where attention is one operation, its three parts are None, and replacing one of
    them raises ValueError.
    """

    attention: Callable[[Array, Array, Array, Array, Scope], Array]  # q, keys, values, mask, scope -> heads
    feed_forward: Callable[[Array, Scope], Array]
    attention_scores: Callable[[Array, Array, Array], Array] = ops.attention_scores
    softmax: Callable[[Array], Array] = ops.softmax
    attention_heads: Callable[[Array, Array], Array] = ops.attention_heads
    embed: Callable[[Array, Weight], Array] = engine.embed
    linear: Callable[[Array, Weight], Array] = engine.linear
    linears: Linears = engine.linears
    rms_norm: Callable[[Array, Array, float], Array] = ops.rms_norm
    rope_frequencies: Callable[[int, float, RopeScaling | LinearRopeScaling | None, DTypeLike], Array] = ops.rope_frequencies
    rope_rotation: Callable[[Array, Array], tuple[Array, ...]] = ops.rope_rotation
    rope: Callable[..., Array] = ops.rope  # x, then what rope_rotation returns
    causal_mask: Callable[[Array, Array, DTypeLike], Array] = ops.causal_mask
    swiglu: Callable[[Array, Array], Array] = ops.swiglu

    def __post_init__(self) -> None:
        parts = ("attention_scores", "softmax", "attention_heads")
        given = [name for name in parts if getattr(self, name) is not None]
        if 0 < len(given) < len(parts):
            raise ValueError(f"{', '.join(given)} would not be called: attention is computed as one; replace it in model.PLAIN")


@dataclass(slots=True)  # not frozen: that takes six times as long to construct, and each layer constructs three
class Scope:
    """A view of one pass under a name prefix: s["wq"] is a weight and s.see("q", x) an activation with that prefix.

    prefix  of the names, such as `layers.0.attention.`
    layer   the number of the layer that it is in, -1 outside of all
    """

    params: Params
    config: Config
    cache: KVCache
    ops: Ops
    tap: Tap | None = None
    prefix: str = ""
    layer: int = -1

    def in_layer(self, layer: int) -> Scope:
        """Return the view of the same pass under a layer's prefix."""
        return Scope(self.params, self.config, self.cache, self.ops, self.tap, f"layers.{layer}.", layer)

    def under(self, name: str) -> Scope:
        """Return a view of the same pass whose prefix is longer by one name."""
        return Scope(self.params, self.config, self.cache, self.ops, self.tap, f"{self.prefix}{name}.", self.layer)

    @overload  # vectors are in no packed form
    def __getitem__(self, name: Literal["attention_norm", "ffn_norm", "norm"]) -> Array: ...
    @overload
    def __getitem__(self, name: str) -> Weight: ...
    def __getitem__(self, name: str) -> Weight:
        return self.params[f"{self.prefix}{name}.weight"]

    def see(self, name: str, x: Array) -> Array:
        """Pass an activation to the tap and return the tap's result; ValueError if that is no array of the same shape."""
        if self.tap is None:
            return x
        y = self.tap(self.prefix + name, x)
        if not isinstance(y, np.ndarray) or y.shape != x.shape:
            found = f"an array of shape {y.shape}" if isinstance(y, np.ndarray) else repr(y)[:60]
            raise ValueError(f"the tap returned {found} for {self.prefix}{name}, expected an array of shape {x.shape}")
        return y
