"""How far rounding alone takes each activation: the measure against which a candidate's error is judged.

The error of an activation is measured token by token, so that the one token whose values are a thousand times the others' (the
first, in most trained models) hides nothing. Two norms of the difference d of a token's numbers are taken: the root of the mean
square, and the largest magnitude, which shows a single wrong number among many. Both are given relative to the root mean square
of the reference's numbers r:

    error = sqrt(mean d²) / sqrt(mean r²)   or   max |d| / sqrt(mean r²)

The noise floor is the same for the difference of two passes over the same tokens by npllama itself, one in float64 and one in
the candidate's precision (for float64 candidates, float32's divided by 2^29). The float32 pass sums its norms and softmax one
number after the other, since that is what a plain loop does, and less exact than NumPy's sums in pairs. A token's floor is not
taken below the median of all tokens', since few numbers can agree by chance, nor below one rounding of the reference. A
candidate is different when, at some token, its error is more than a limit times the floor.

The limit is 32 times the floor, and 6 for 16-bit precisions, because programs that are right round in other ways than npllama:
they sum in other orders, multiply by an inverse, fuse operations. The largest ratios of right programs, over all activations
and tokens (tests/test_compare_noise.py and tests/test_compare_worked_example.py measure again):

| program | accumulated | local |
|---|---|---|
| float32, plain loops forwards or backwards, widths 96 to 4096 | 7 | 12, in a sum of 14336 products |
| float32, tests/ports/llama.c without its mistake, the embedded model | 5 | 14 |
| float32, Hugging Face on torch, tiny models | 6 | 7 |
| bfloat16, Hugging Face's rounding points judged by Meta's, or the reverse | 3.3 | 2.1 |

The mistakes of tests/broken_ports.py are beyond 1000, but for those that only 16-bit rounding hides.

Without a model nothing can be measured. A golden bundle brings its floors with it. Otherwise the floor is a multiple of the
reference's size at each token, DEFAULTS: about what two layers of width 96 come to (6 to 28 units of rounding in the root mean
square, 20 to 190 in the largest). Real noise depends on the weights and grows with depth: give the model when you can.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import ops
from ..checkpoint import Model
from ..model import forward, no_tap
from ..precision import Precision
from ..trace import run
from .inputs import Activations
from .metrics import unit_roundoff
from .names import by_token

LIMITS = {"float64": 32.0, "float32": 32.0, "bfloat16": 6.0, "float16": 6.0}
# The floors of both norms without a model, in units of the precision's largest relative rounding error (2^-24 in float32).
DEFAULTS = {"float64": (16, 96), "float32": (16, 96), "bfloat16": (8, 48), "float16": (8, 48)}


class Norms(NamedTuple):
    """The size of each token's numbers, or of their difference.    each float64 [..., T]"""

    rms: np.ndarray
    max: np.ndarray


def norms(rows: np.ndarray) -> Norms:
    """The two sizes of each row's finite numbers.    [..., T, numbers] -> [..., T]"""
    finite = np.isfinite(rows)
    x = np.where(finite, rows, 0.0).astype(np.float64)
    largest = np.max(np.abs(x), axis=-1, initial=0.0)
    count = np.maximum(np.count_nonzero(finite, axis=-1), 1)
    return Norms(np.sqrt(np.sum(x * x, axis=-1) / count), largest)


def difference(name: str, a: np.ndarray, b: np.ndarray) -> Norms:
    """The sizes of a - b at each token; what is not finite in both is left out."""
    with np.errstate(invalid="ignore"):  # inf - inf is not a number, and is left out
        return norms(by_token(name, a).astype(np.float64) - by_token(name, b))


class NoiseFloor:
    """What rounding does to each activation in a precision: measured where a name is known, else by DEFAULTS.

    accumulated   name -> the difference of two whole passes
    local         name -> the difference when an operation gets the same inputs in both precisions
    source        where the numbers are from, for people
    """

    def __init__(self, precision: str, source: str, accumulated: Mapping[str, Norms], local: Mapping[str, Norms]):
        self.precision, self.source, self.accumulated, self.local = precision, source, accumulated, local

    @property
    def limit(self) -> float:
        """How many times the floor an error may be."""
        return LIMITS[self.precision]

    def floor(self, name: str, size: Norms, kept: np.ndarray, local: bool = False) -> Norms:
        """The floor at each token that is kept, for a reference of this size there.    kept bool [..., T]; size, floor [n]"""
        u = unit_roundoff(self.precision)
        noise = (self.local if local else self.accumulated).get(name)
        if noise is None:
            return Norms(*(factor * u * size.rms for factor in DEFAULTS[self.precision]))
        one_rounding = Norms(u * size.rms, u * size.max)
        noise = Norms(*(n[kept] for n in noise))
        return Norms(*(np.maximum(np.maximum(n, np.median(n)), r) for n, r in zip(noise, one_rounding, strict=True)))


def default_noise(precision: str) -> NoiseFloor:
    """The floor without a model."""
    return NoiseFloor(precision, f"default for {precision}, since no model is at hand to measure with", {}, {})


def bundled_noise(reference: Activations, precision: str) -> NoiseFloor | None:
    """The floor that a golden bundle's trace.json has for each activation; None in a trace that isn't one."""
    found = {}
    for name, entry in (reference.meta or {}).get("activations", {}).items():
        if numbers := entry.get("noise", {}).get(precision):
            tokens = by_token(name, reference[name]).shape[:-1]
            found[name] = Norms(*(np.broadcast_to(np.asarray(numbers[norm], np.float64), tokens) for norm in Norms._fields))
    return NoiseFloor(precision, f"that of the golden bundle {reference.path}", found, {}) if found else None


def noise_between(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], precision: str, source: str) -> NoiseFloor:
    """The floor from two traces of the same tokens, one in float64 and one in the precision; shapes must agree.

    Raises ValueError with the first name that only one has, or that differs in shape.
    """
    noise = {}
    for name in a:
        if name in b:
            x, y = a[name], b[name]
            if x.shape != y.shape:
                raise ValueError(f"{source}: {name} has the shape {list(y.shape)}, expected {list(x.shape)}")
            noise[name] = difference(name, x, y)
    if not noise:
        raise ValueError(f"{source}: no activation in common with the reference")
    if not any(n.max.any() for n in noise.values()):
        raise ValueError(f"{source}: equal to the reference; a noise trace is the same tokens in another precision")
    return NoiseFloor(precision, source, noise, {})


def measure_noise(
    model: Model, tokens: ArrayLike, steps: list, precision: str, convention: str | None, names: Collection[str]
) -> NoiseFloor:
    """The floor of the named activations: the tokens computed in float64 and in the precision, and once more in float64 with
    the named activations replaced by the precision's, so that each shows only the rounding since the ones before it."""
    scale, computed = 1.0, Precision(precision, convention)
    if precision == "float64":  # there is nothing better to hold it against, but both round alike
        scale, computed = unit_roundoff("float64") / unit_roundoff("float32"), Precision("float32")
    rounded: dict[str, np.ndarray] = {}
    accumulated: dict[str, Norms] = {}
    local: dict[str, Norms] = {}

    def record(name: str, x: np.ndarray) -> np.ndarray:
        if name in names:
            rounded[name] = x.copy()
        return x

    def against_whole_pass(name: str, x: np.ndarray) -> np.ndarray:
        if name in names:
            accumulated[name] = Norms(*(scale * n for n in difference(name, rounded[name], x)))
        return x

    def against_operation(name: str, x: np.ndarray) -> np.ndarray:
        if name not in names:
            return x
        local[name] = Norms(*(scale * n for n in difference(name, rounded[name], x)))
        return rounded[name].astype(np.float64)

    run(model, tokens, steps, _Plain() if computed.name == "float32" else computed, record)
    run(model, tokens, steps, Precision("float64"), against_whole_pass)
    run(model, tokens, steps, Precision("float64"), against_operation)
    return NoiseFloor(precision, f"measured: npllama in {computed.name} against float64", accumulated, local)


class _Plain(Precision):
    """Float32 whose norms and softmax sum as a loop would, one number after the other."""

    def forward(self, params, config, tokens, cache=None, tap=no_tap, last_only=False):
        """As Precision's."""
        return forward(self.params(params), config, tokens, cache, tap, last_only, _plain_ops())


def _plain_ops() -> SimpleNamespace:
    def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        mean_square = np.cumsum(x * x, axis=-1)[..., -1:] / np.asarray(x.shape[-1], x.dtype)
        return x / np.sqrt(mean_square + eps) * weight

    def softmax(x: np.ndarray) -> np.ndarray:
        y = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return y / np.cumsum(y, axis=-1)[..., -1:]

    return SimpleNamespace(**{**vars(ops), "rms_norm": rms_norm, "softmax": softmax})
