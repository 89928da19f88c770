"""The operations of the suite: what a port's function is called, takes and returns, and how npllama computes it.

A `Program` computes: in a precision, and with a mistake where a wrong result is wanted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ... import model, ops
from ...config import Config, LinearRopeScaling, RopeScaling
from ...engine import linear
from ...engine.weights import Weight, widen
from ...errors import NpllamaError
from ...scope import Ops
from ..mistakes import Mistake, to_halves, to_pairs
from ..precision import Precision, round_bfloat16, round_float16

Arguments = Mapping[str, Any]  # arrays and constants by name
Outputs = dict[str, np.ndarray]
Compute = Callable[["Program", Arguments], "np.ndarray | tuple[np.ndarray, ...]"]

# What a case does not state; no operation of a case reads it.
BASE = Config(
    dim=96,
    n_layers=1,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=64,
    vocab_size=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=131072,
    tied_embeddings=False,
)


class DoesNotApply(NpllamaError):
    """The mistake is none that this case could show."""


@dataclass(frozen=True, eq=False)
class Program:
    """Something that computes the operations: npllama in a precision, or the same with one mistake."""

    precision: Precision
    mistake: Mistake | None = None

    @functools.cached_property
    def ops(self) -> Ops:
        """Its operations, the mistaken ones among them."""
        made = self.precision.ops or model.PLAIN
        return replace(made, **self.mistake.ops) if self.mistake else made

    def constants(self, **stated: Any) -> Config:
        """Return the constants as it has them, for those that the case states."""
        config = replace(BASE, **stated)
        if self.mistake is None:
            return config
        if not self.mistake.applies(config):
            raise DoesNotApply
        try:
            return self.mistake.constants(config)
        except (TypeError, ValueError) as error:  # a scaling that the config has none of
            raise DoesNotApply from error

    def weight(self, weight: np.ndarray) -> Weight:
        """Return a weight matrix as it has it."""
        if self.mistake is None or self.mistake.parameters is None:
            return weight
        try:
            return self.mistake.parameters("output.weight", {"output.weight": weight}, BASE)
        except KeyError as error:  # another weight in its place, of which a single operation has none
            raise DoesNotApply from error


@dataclass(frozen=True)
class Operation:
    """One operation.

    arguments  of the function, in its order
    outputs    what it returns, a tuple where there are several
    compute    npllama's own
    text       formula, shapes and source
    exact      rounds nothing: results are equal in every precision
    rounded    its result is rounded to 16 bits in a 16-bit precision
    relative   its numbers are of very different size, and each is judged relative to itself
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Compute
    text: str
    exact: bool = False
    rounded: bool = True
    relative: bool = False

    @property
    def signature(self) -> str:
        """As a port's function has it."""
        return f"{self.name}({', '.join(self.arguments)}) -> {', '.join(self.outputs)}"

    def inputs(self, arguments: Arguments, precision: Precision) -> list[Any]:
        """Return what a port's function is called with: arrays of its own, floats in the precision's dtype."""
        dtype = precision.dtype if not self.exact else np.dtype(np.float32)

        def given(x: Any) -> Any:
            if isinstance(x, np.ndarray):
                return x.astype(dtype if x.dtype == np.float32 else x.dtype)
            return dict(x) if isinstance(x, Mapping) else x

        return [given(arguments[name]) for name in self.arguments]

    def run(self, program: Program, arguments: Arguments) -> Outputs:
        """Compute it."""
        given = dict(zip(self.arguments, self.inputs(arguments, program.precision), strict=True))
        with np.errstate(all="ignore"):
            found = self.compute(program, given)
        found = found if isinstance(found, tuple) else (found,)
        if self.rounded and not self.exact:
            found = tuple(program.precision.round(x) for x in found)
        return dict(zip(self.outputs, found, strict=True))


def scaling_of(value: Mapping[str, Any] | None) -> RopeScaling | LinearRopeScaling | None:
    """Return the scaling that a case's JSON states: null, or an object of `factor` alone or of all four."""
    if value is None:
        return None
    return LinearRopeScaling(**value) if set(value) == {"factor"} else RopeScaling(**value)


def _doc(function: Callable) -> str:
    return inspect.getdoc(function) or ""


def _frequencies(p: Program, head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> np.ndarray:
    config = p.constants(rope_theta=theta, rope_scaling=scaling_of(scaling))
    return p.ops.rope_frequencies(head_dim, config.rope_theta, config.rope_scaling, p.precision.dtype)


def _rope_at(p: Program, a: Arguments) -> np.ndarray:
    frequencies = _frequencies(p, a["x"].shape[-1], a["theta"], a["scaling"])
    return p.ops.rope(a["x"], *p.ops.rope_rotation(a["positions"], frequencies))


def _linear(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.linear(a["x"], p.weight(a["weight"]))


def _widened(p: Program, a: Arguments, weight: np.ndarray) -> np.ndarray:
    return p.ops.linear(a["x"], p.weight(weight.astype(p.precision.dtype)))


def _silu(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.swiglu(a["x"], np.ones_like(a["x"]))


def _mask(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.causal_mask(a["query_positions"], a["slot_positions"], p.precision.dtype)


def _rms_norm(p: Program, a: Arguments) -> np.ndarray:
    return p.ops.rms_norm(a["x"], a["weight"], p.constants(norm_eps=a["eps"]).norm_eps)


def _wrong(p: Program, name: str, right: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Return a function that is no operation of a pass, as the program has it."""
    return p.mistake.outside.get(name, right) if p.mistake else right


def _of(*rows: Any, **facts: Any) -> Operation:
    name, arguments, outputs, compute, text = rows
    return Operation(name, tuple(arguments.split()), tuple(outputs.split()), compute, text, **facts)


HALF_SPLIT = """\
Rotate each pair (x[j], x[j + K/2]) of a head's numbers: RoPE in Hugging Face's order of a head.

y[j] + i·y[j + K/2] = (x[j] + i·x[j + K/2]) · e^(i·m·θ_j)        x [..., T, heads, K], cos, sin [..., T, 1, K/2] -> like x"""
ROPE_AT = """\
Rotate each adjacent pair of a head's numbers by the angles of its position: rope_frequencies, rope_rotation and rope in one.

y[2j] + i·y[2j+1] = (x[2j] + i·x[2j+1]) · e^(i·m·θ_j)        x [T, heads, K], positions [T] -> like x"""
OF_BFLOAT16 = """\
Multiply by a weight matrix that is stored in bfloat16: the upper 16 bits of a float32, given as uint16.

y = x Wᵀ        x [..., in], weight uint16 [out, in] -> [..., out]"""
OF_INT8 = """\
Multiply by a weight matrix that is stored in 8 bits, with a scale for each row.

y = x Wᵀ,  W[i, j] = weight[i, j] · scale[i]        x [..., in], weight int8 [out, in], scale [out] -> [..., out]"""
OF_GROUPS = """\
Multiply by a weight matrix that is stored in 8 bits, with a scale for each group of 32 numbers of a row, as Q8_0 has.

y = x Wᵀ,  W[i, j] = weight[i, j] · scale[i, j // 32]

x [..., in], weight int8 [out, in], scale [out, in / 32] -> [..., out]"""

L1 = {
    operation.name: operation
    for operation in (
        _of("embed", "tokens weight", "y", lambda p, a: p.ops.embed(a["tokens"], a["weight"]), _doc(linear.embed), exact=True),
        _of("linear", "x weight", "y", _linear, _doc(linear.linear)),
        _of("linear_bfloat16", "x weight", "y", lambda p, a: _widened(p, a, widen(a["weight"])), OF_BFLOAT16),
        _of(
            *("linear_int8", "x weight scale", "y"),
            lambda p, a: _widened(p, a, a["weight"] * _wrong(p, "scale_of_rows", _scale_of_rows)(a["scale"], a["weight"])),
            OF_INT8,
        ),
        _of(
            *("linear_groups", "x weight scale", "y"),
            lambda p, a: _widened(p, a, a["weight"] * _wrong(p, "scale_of_groups", _scale_of_groups)(a["scale"], a["weight"])),
            OF_GROUPS,
        ),
        _of("rms_norm", "x weight eps", "y", _rms_norm, _doc(ops.rms_norm)),
        _of("softmax", "x", "y", lambda p, a: p.ops.softmax(a["x"]), _doc(ops.softmax)),
        _of("silu", "x", "y", _silu, _doc(ops.silu)),
        _of("swiglu", "gate up", "y", lambda p, a: p.ops.swiglu(a["gate"], a["up"]), _doc(ops.swiglu)),
        _of(
            *("rope_frequencies", "head_dim theta scaling", "frequencies"),
            lambda p, a: _frequencies(p, a["head_dim"], a["theta"], a["scaling"]),
            _doc(ops.rope_frequencies),
            rounded=False,
            relative=True,
        ),
        _of(
            *("rope_rotation", "positions frequencies", "cos sin"),
            lambda p, a: p.ops.rope_rotation(a["positions"], a["frequencies"]),
            _doc(ops.rope_rotation),
            rounded=False,
        ),
        _of("rope", "x cos sin", "y", lambda p, a: p.ops.rope(a["x"], a["cos"], a["sin"]), _doc(ops.rope)),
        _of(
            *("rope_half_split", "x cos sin", "y"),
            lambda p, a: to_halves(p.ops.rope(to_pairs(a["x"]), a["cos"], a["sin"])),
            HALF_SPLIT,
        ),
        _of("rope_at", "x positions theta scaling", "y", _rope_at, ROPE_AT),
        _of("causal_mask", "query_positions slot_positions", "mask", _mask, _doc(ops.causal_mask), exact=True),
        _of(
            *("attention_scores", "q keys mask", "scores"),
            lambda p, a: p.ops.attention_scores(a["q"], a["keys"], a["mask"]),
            _doc(ops.attention_scores),
        ),
        _of(
            *("attention_heads", "weights values", "heads"),
            lambda p, a: p.ops.attention_heads(a["weights"], a["values"]),
            _doc(ops.attention_heads),
        ),
        _of(
            *("round_bfloat16", "x", "y"),
            lambda p, a: _wrong(p, "round_bfloat16", round_bfloat16)(a["x"]),
            _doc(round_bfloat16),
            exact=True,
        ),
        _of(
            *("round_float16", "x", "y"),
            lambda p, a: _wrong(p, "round_float16", round_float16)(a["x"]),
            _doc(round_float16),
            exact=True,
        ),
    )
}


def _scale_of_rows(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spread the scales of rows over a matrix.    scale [out], weight [out, in] -> [out, 1]"""
    return scale[:, None]


def _scale_of_groups(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Spread the scales of groups over a matrix.    scale [out, in / 32], weight [out, in] -> [out, in]"""
    return np.repeat(scale, weight.shape[-1] // scale.shape[-1], axis=-1)


OPERATIONS = dict(L1)
