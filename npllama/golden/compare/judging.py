"""Judge two arrays of one activation: align them, compare them token by token, and with the noise floor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ...checkpoint import Model
from ...config import Config
from .maps import Rule
from .names import by_token, place
from .noise import NoiseFloor, Norms, norms

# exp() of a score this far below its row's largest is zero in float32, so that any such number masks as -inf does.
MASKED_BELOW = 104.0


@dataclass(frozen=True)
class Judged:
    """Error at the worst token and norm: the one with the largest multiple of the floor."""

    error: float  # relative to the reference's root mean square at that token
    floor: float  # likewise
    ratio: float  # error / floor
    limit: float  # the largest ratio allowed
    norm: str  # "rms" or "max", the norms of noise.py
    token: int  # counted along the reference's tokens, the rows of a batch in sequence

    @property
    def passed(self) -> bool:
        """Return whether it is within the limit."""
        return self.ratio <= self.limit


@dataclass
class Aligned:
    """Hold all arrays that are compared, in the reference's layout; hints use it."""

    reference: Mapping[str, np.ndarray]
    candidate: dict[str, np.ndarray]  # canonical name -> array; T may be shorter
    config: Config | None
    model: Model | None
    tokens: np.ndarray | None
    steps: list
    rules: dict[str, Rule] = field(default_factory=dict)  # canonical name -> the rule of the map that arranged it
    unfit: dict[str, tuple[int, ...]] = field(default_factory=dict)  # canonical name -> a shape that doesn't fit

    def padding(self, name: str) -> np.ndarray | None:
        """Return which of the activation's tokens are padding, bool [..., T]; None if none is."""
        if self.tokens is None or place(name).step is not None or (self.tokens >= 0).all():
            return None
        return self.tokens < 0


def pair(aligned: Aligned, name: str, c: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return both in float64 and the same shape, padding zeroed, and which tokens count.    c, r like r; bool [..., T]"""
    axes = place(name).axes
    c, r = c.astype(np.float64), r.astype(np.float64)
    kept = np.ones(by_token(name, r).shape[:-1], bool)
    padding = aligned.padding(name)
    if axes:
        t_axis = axes.index("T") - len(axes)
        n = c.shape[t_axis]
        if n < r.shape[t_axis]:
            r = np.take(r, range(r.shape[t_axis] - n, r.shape[t_axis]), axis=t_axis)
            kept[..., :-n] = False
        if padding is not None:
            kept &= ~padding
            here = np.expand_dims(padding[..., -n:], [i for i in range(-len(axes), 0) if i != t_axis])
            c, r = np.where(here, 0.0, c), np.where(here, 0.0, r)
        if axes[-1] == "S" and place(name).kind.endswith("scores"):
            c = _as_masked(c, r)
    return c, r, kept


def _as_masked(c: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Replace finite masked scores, such as -1e9, by -inf where they are low enough to mask."""
    hidden = np.isneginf(r)
    with np.errstate(invalid="ignore"):
        largest = np.max(np.where(hidden, -np.inf, c), axis=-1, keepdims=True)
        return np.where(hidden & (c < largest - MASKED_BELOW), -np.inf, c)


def problem_of(name: str, c: np.ndarray, r: np.ndarray) -> str | None:
    """Describe NaN, infinities and masks that differ between two arrays; None if there are none."""
    only_masked_here = np.isneginf(c) & ~np.isneginf(r)
    scores = place(name).kind == "attention.scores"  # -inf is a mask there, and a mistake elsewhere
    kinds = {
        "NaN": np.isnan(c),
        "infinite": np.isposinf(c) | (only_masked_here & (not scores)),
        "masked in the candidate, not masked in the reference": only_masked_here & scores,
        "masked in the reference, not masked in the candidate": np.isneginf(r) & np.isfinite(c),
        "NaN or infinite in the reference": np.isnan(r) | np.isposinf(r),
    }
    for what, where in kinds.items():
        if count := np.count_nonzero(where):
            return f"{count} {what}, the first at {np.argwhere(where)[0].tolist()}"
    return None


def judge(
    name: str, c: np.ndarray, r: np.ndarray, kept: np.ndarray, noise: NoiseFloor, local: bool = False, one: bool = False
) -> Judged:
    """Judge two arrays of the same shape by their worst token; numbers that aren't finite in both are left out.

    local   r is computed from the candidate's own activations
    one     exactly one operation is between those and this activation, so that the stricter limit applies
    """
    with np.errstate(invalid="ignore"):
        error, size = norms(by_token(name, c - r)), norms(by_token(name, r))
    n = error.rms.shape[-1]
    inner = kept[..., -n:]
    error, size = (Norms(*(x[inner] for x in pair)) for pair in (error, size))
    floor = noise.floor(name, size, kept, local, one)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.array([np.where(e == 0, 0.0, e / f) for e, f in zip(error, floor, strict=True)])  # [2, tokens]
        norm, at = np.unravel_index(np.argmax(ratios), ratios.shape)
        relative, of_floor = (0.0 if x[norm][at] == 0 else float(x[norm][at] / size.rms[at]) for x in (error, floor))
    token = int(np.flatnonzero(kept.reshape(-1))[at])
    limit = noise.limits.one if one else noise.limits.several
    return Judged(relative, of_floor, float(ratios[norm, at]), limit, Norms._fields[norm], token)


def relative_error(c: np.ndarray, r: np.ndarray) -> float:
    """Return sqrt(Σ (c - r)² / Σ r²) over the numbers that are finite in both."""
    both = np.isfinite(c) & np.isfinite(r)
    size = math.sqrt(float(np.sum(r[both] ** 2)))
    return math.sqrt(float(np.sum((c[both] - r[both]) ** 2))) / size if size else math.inf
