"""Measure how far rounding alone takes each activation: the noise floor by which a candidate's error is judged.

The error of an activation is measured token by token, so that the one token whose values are a thousand times the others' (the
first, in most trained models) hides nothing. Two norms of the difference d of a token's numbers are taken: the root of the mean
square, and the largest magnitude, which shows a single wrong number among many. Both are given relative to the root mean square
of the reference's numbers r:

    error = sqrt(mean d²) / sqrt(mean r²)   or   max |d| / sqrt(mean r²)

The noise floor is the same for the difference of two passes over the same tokens by npllama itself, one in float64 and one in
the candidate's precision (for float64 candidates, float32's divided by 2^29). One pass's error at one token is a single draw,
which may by chance be a tenth of the next program's. Two passes are therefore made in that precision, and the larger difference
counts: in 16 bits one rounds where Meta's code does and one where Hugging Face's does, whichever the candidate follows; in
float32 one sums its norms and softmax one number after the other, since that is what a plain loop does, and one in pairs, as
NumPy does. A token's floor is not taken below the median of all tokens', since few numbers can agree by chance, nor below one
rounding of the reference. A candidate is different when, at some token, its error is more than a limit times the floor.

Two errors are judged: that of the whole computation up to an activation ("accumulated"), and, with a model, that of the
operations between the candidate's own recorded activations ("local"), a single operation where all its inputs are recorded. The
limits, LIMITS, are wide because correct programs round in other ways than npllama: they sum in other orders, multiply by an
inverse, fuse operations. The largest ratios of correct programs, over all activations and tokens
(tests/golden/compare/test_noise.py and tests/golden/compare/test_worked_example.py measure again, on SmolLM2-135M where
NPLLAMA_TEST_MODELS has it):

| program | accumulated | local, one operation | local, several |
|---|---|---|---|
| float32, plain loops forwards or backwards, widths 96 to 4096 | 4 | 13, in a sum of 14336 products | |
| float32, tests/ports/llama.c without its mistake, the embedded model | 4 | 9 | |
| float32, Hugging Face on torch, tiny models | 6 | 7 | |
| float32, Hugging Face on torch, SmolLM2, 3 prompts of 142 to 300 tokens | 5.5 | 10 | 3.1 |
| the limits in float32 | 32 | 32 | 32 |
| bfloat16, Hugging Face on torch, SmolLM2, 7 prompts of 11 to 300 tokens | 5.8 | 2.0 | 3.9 |
| float16, the same, 2 prompts of 142 and 149 tokens | 4.0 | 1.9 | 4.7 |
| bfloat16, rounding the results of operations only, or all but the scores and weights, SmolLM2, 3 prompts | 7.6 | 1.8 | 3.5 |
| the same on the embedded model, 400 tokens | 3.3 | 1.1 | 2.0 |
| the limits in 16 bits | 16 | 6 | 16 |

Quantised programs, judged by their rounding profile (tests/convert/test_capture_llamacpp.py, a tiny model in every kind of
weights):

| program | accumulated | local, one operation | local, several |
|---|---|---|---|
| llama.cpp, F32, F16 and BF16 weights | 1.6 | 3.4 | |
| llama.cpp, Q8_0, Q4_0 and Q5_0 weights, float32 and float16 cache | 1.7 | 2.6; 19 where a number was rounded the other way | |
| llama.cpp, Q4_1 and Q5_1 weights, with the rounding of sums; without it, local 14 | 1.5 | 2.3 | |
| llama.cpp, SmolLM2-135M in Q4_1, 6 tokens, at its worst operation | 6.6 | 8.2, where a number was rounded the other way | |
| llama.cpp with flash attention | 3.9 | | 4.1 |
| the limits with parts | 8 | 32 | 8 |

Judged by one pass, torch is up to 33 accumulated in bfloat16 and 16 in float32, both at 300 tokens, and 2.4 by one operation. A
floor that comes from one pass, of a trace or a golden bundle, therefore has the limit ONE_PASS, and can still be wrong at one
token in many: a model is better. Mistakes in 16 bits, on the other hand (SmolLM2 and tiny models, accumulated): those of
tests/helpers/broken_ports.py from 50 on, the first token hidden from the last 190, weights of attention that are 3 % too small
21. Bits that are cut off instead of rounded exceed no operation's limit (4 at most), but all errors have one sign, and
accumulate to 17 to 93 in trained models. In float32 those mistakes exceed 1000, except for those that only 16-bit rounding
hides.

Without a model nothing can be measured. A golden bundle includes its floors. Otherwise the floor is a multiple of the
reference's size at each token, DEFAULTS: in float32 about that of two layers of width 96 (6 to 28 units of rounding in the
root mean square, 20 to 190 in the largest); in 16 bits it grows with the layer, as noise does, so that the first layers, where
most mistakes show, are judged most strictly (correct programs on SmolLM2's 9 prompts are at most 10 times it, of 16). Real
noise depends on the weights: give the model when you can.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...activations import AFTER
from ...checkpoint import Model
from ...config import Config
from ...scope import Tap
from ..precision import CONVENTIONS, Precision, SequentialSums
from ..trace import Recording, run
from .inputs import Activations
from .metrics import unit_roundoff
from .names import by_token, place


class Limits(NamedTuple):
    """Limits of an error, in multiples of its floor."""

    several: float  # of the computation so far, or of several operations between two recorded activations
    one: float  # of one operation, given the candidate's own inputs


LIMITS = {"float64": Limits(32, 32), "float32": Limits(32, 32), "bfloat16": Limits(16, 6), "float16": Limits(16, 6)}
ONE_PASS = 32.0  # replaces the first limit if the floor is from one pass, such as a trace's
WITH_PARTS = 8.0  # the first limit with parts of a profile: a correct program rounds nearly all numbers as npllama does
FLIPS = 2.0  # how many numbers of a sum may be rounded to 8 bits the other way
# The floors of both norms without a model, in units of the precision's largest relative rounding error (2^-24 in float32), and
# the share of themselves that they grow by with each layer.
DEFAULTS = {"float64": (16, 96, 0), "float32": (16, 96, 0), "bfloat16": (3, 36, 0.25), "float16": (3, 36, 0.25)}


class Norms(NamedTuple):
    """Two norms of each token's numbers, or of their difference.    each float64 [..., T]"""

    rms: np.ndarray
    max: np.ndarray


def norms(rows: np.ndarray) -> Norms:
    """Return the two norms of each row's finite numbers.    [..., T, numbers] -> [..., T]"""
    finite = np.isfinite(rows)
    x = np.where(finite, rows, 0.0).astype(np.float64)
    largest = np.max(np.abs(x), axis=-1, initial=0.0)
    count = np.maximum(np.count_nonzero(finite, axis=-1), 1)
    return Norms(np.sqrt(np.sum(x * x, axis=-1) / count), largest)


def difference(name: str, a: np.ndarray, b: np.ndarray) -> Norms:
    """Return the norms of a - b at each token; what is not finite in both is left out."""
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, and is left out
        return norms(by_token(name, a).astype(np.float64) - by_token(name, b))


class NoiseFloor:
    """Hold the rounding error of each activation in a precision: measured where its name is known, else by DEFAULTS.

    accumulated   name -> the difference of two whole passes
    local         name -> the difference when an operation gets the same inputs in both precisions
    source        the origin of the numbers, for readers
    limits        how many times the floor an error may be
    n_layers      number of layers of the model, if it isn't measured
    parts         the further roundings of a rounding profile (precision.PARTS)
    several       like local, for several operations between recorded activations; local itself where it isn't given
    """

    def __init__(
        self,
        precision: str,
        source: str,
        accumulated: Mapping[str, Norms],
        local: Mapping[str, Norms],
        limits: Limits | None = None,
        n_layers: int = 0,
        parts: tuple[str, ...] = (),
        several: Mapping[str, Norms] | None = None,
    ):
        self.precision, self.source, self.accumulated, self.local = precision, source, accumulated, local
        self.limits, self.n_layers, self.parts = limits or LIMITS[precision], n_layers, parts
        self.several = local if several is None else several

    @property
    def title(self) -> str:
        """Return the name of the rounding profile to which it applies."""
        return Precision(self.precision, parts=self.parts).profile

    def floor(self, name: str, size: Norms, kept: np.ndarray, local: bool = False, one: bool = False) -> Norms:
        """Return the floor at each token kept, for a reference of this size there.    kept bool [..., T]; size, floor [n]"""
        u = unit_roundoff(self.precision)
        noise = ((self.local if one else self.several) if local else self.accumulated).get(name)
        if noise is None:
            *factors, growth = DEFAULTS[self.precision]
            here = place(name)
            depth = self.n_layers if here.row in AFTER else here.layer or 0
            return Norms(*(factor * (1 + growth * depth) * u * size.rms for factor in factors))
        one_rounding = Norms(u * size.rms, u * size.max)
        noise = Norms(*(n[kept] for n in noise))
        return Norms(*(np.maximum(np.maximum(n, np.median(n)), r) for n, r in zip(noise, one_rounding, strict=True)))


def default_noise(precision: str, n_layers: int = 0, parts: tuple[str, ...] = ()) -> NoiseFloor:
    """Return the floor without a model."""
    precision = coarsest(precision, parts)
    source = f"default for {precision}, since there is no model to measure with"
    return NoiseFloor(precision, source, {}, {}, n_layers=n_layers)


def coarsest(precision: str, parts: tuple[str, ...]) -> str:
    """Return the precision whose noise is about as large as that of the parts: 8 bits in blocks are about a bfloat16."""
    sizes = ["float16" if part.startswith("float16") else "bfloat16" for part in parts]
    return max([precision, *sizes], key=unit_roundoff)


def bundled_noise(reference: Activations, precision: str) -> NoiseFloor | None:
    """Return the floor that a golden bundle's trace.json has for each activation; None in a trace that isn't one."""
    found = {}
    for name, entry in (reference.meta or {}).get("activations", {}).items():
        if numbers := entry.get("noise", {}).get(precision):
            tokens = by_token(name, reference[name]).shape[:-1]
            found[name] = Norms(*(np.broadcast_to(np.asarray(numbers[norm], np.float64), tokens) for norm in Norms._fields))
    return (
        NoiseFloor(precision, f"that of the golden bundle {reference.path}", found, {}, one_pass(precision)) if found else None
    )


def one_pass(precision: str) -> Limits:
    """Return the limits for a floor that is from one pass."""
    return LIMITS[precision]._replace(several=ONE_PASS)


def noise_between(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], precision: str, source: str) -> NoiseFloor:
    """Return the floor from two traces of the same tokens, one in float64 and one in the precision; shapes must agree.

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
    return NoiseFloor(precision, source, noise, {}, one_pass(precision))


def measure_noise(
    model: Model, tokens: ArrayLike, steps: list, precision: str, names: Collection[str], parts: tuple[str, ...] = ()
) -> NoiseFloor:
    """Measure the floor of the named activations.

    The tokens are computed in float64, and twice in the precision, which round at different points. For each of these two,
    another float64 pass replaces the named activations by the rounded ones, so that each shows only the rounding since the ones
    before it. The larger difference counts.

    With parts of a rounding profile, the floor of the computation so far includes their roundings. A single operation is judged
    by its exact result with the parts, and its floor is that of the precision alone, except that FLIPS of its inputs may be
    rounded to 8 bits the other way, as happens to numbers halfway between two. Several operations round numbers that aren't
    recorded, so that their floor includes the parts' roundings.
    """
    scale, computed = 1.0, precision
    if precision == "float64":  # the exact reference is float64 itself, so both round alike
        scale, computed = unit_roundoff("float64") / unit_roundoff("float32"), "float32"
    ways = [Precision(computed, convention, parts) for convention in CONVENTIONS]
    if computed == "float32":
        ways = [SequentialSums(parts=parts), Precision("float32", parts=parts)]
    passes = [Recording() for _ in ways]
    accumulated: dict[str, Norms] = {}
    local: dict[str, Norms] = {}
    several: dict[str, Norms] = {}

    def add(found: dict[str, Norms], name: str, rounded: np.ndarray, x: np.ndarray) -> None:
        new = Norms(*(scale * n for n in difference(name, rounded, x)))
        found[name] = Norms(*map(np.maximum, found[name], new)) if name in found else new

    def against_whole_passes(name: str, x: np.ndarray) -> np.ndarray:
        for rounded in passes:
            if name in rounded:
                add(accumulated, name, rounded[name], x)
        return x

    def recorded(rounded: Recording) -> Tap:
        return lambda name, x: rounded(name, x) if name in names else x

    def against_operations(found: dict[str, Norms], rounded: Recording) -> Tap:
        def tap(name: str, x: np.ndarray) -> np.ndarray:
            if name not in names:
                return x
            add(found, name, rounded[name], x)
            return rounded[name].astype(np.float64)

        return tap

    for way, rounded in zip(ways, passes, strict=True):
        run(model, tokens, steps, way, recorded(rounded))
        run(model, tokens, steps, Precision("float64", parts=parts), against_operations(local, rounded))
        if parts:
            run(model, tokens, steps, Precision("float64"), against_operations(several, rounded))
    run(model, tokens, steps, Precision("float64"), against_whole_passes)
    source = f"measured: npllama in {ways[-1].profile} against float64, the larger of two passes"
    if not parts:
        return NoiseFloor(precision, source, accumulated, local)
    limits = LIMITS[precision]._replace(several=WITH_PARTS)
    if any(part.startswith("int8") for part in parts):
        for name in local:
            if (n := _summed(name, model.config)) and n > 1:
                share = FLIPS * (12 / n) ** 0.5 / limits.one  # a step in a sum of n rounding errors of 1 / sqrt(12) each
                local[name] = Norms(*(np.maximum(x, share * y) for x, y in zip(local[name], several[name], strict=True)))
    return NoiseFloor(precision, source, accumulated, local, limits, parts=parts, several=several)


def _summed(name: str, config: Config) -> int:
    """Return how many products with weights each number of the activation sums; 0 if it isn't such a sum."""
    row = place(name).row
    if row is None or not row.operation.startswith("linear"):
        return 0
    return {"attention.wo": config.n_heads * config.head_dim, "feed_forward.w2": config.ffn_dim}.get(row.weight, config.dim)
