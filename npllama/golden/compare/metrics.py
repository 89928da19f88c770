"""Measure the difference of two arrays by the metrics that papers and test suites use. All are computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Significant bits (the hidden one included) and the exponent of the smallest normal number.
FORMATS = {"float64": (53, -1022), "float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}
TOP = 5


@dataclass(frozen=True)
class Metrics:
    """Distance of a candidate c from a reference r, over the elements that are finite in both."""

    max_abs: float  # max |c - r|
    max_rel: float  # max |c - r| / |r|; where r is 0, 0 if c is too, else infinite
    rms: float  # sqrt(mean (c - r)²)
    nmse: float  # Σ (c - r)² / Σ r²
    cosine: float  # c·r / (|c| |r|); 1 if both are 0, 0 if one is
    max_ulp: float  # max |c - r| in units in the last place of r, in the candidate's precision
    median_ulp: float  # the median of the same, which numbers near zero don't dominate
    kl: float | None = None  # of logits: the mean over tokens of Σ p_r log(p_r / p_c), in nats
    top1: float | None = None  # of logits: the share of tokens whose largest logit is the same one
    top5: float | None = None  # of logits: the mean share of the five largest that are the same ones


def unit_roundoff(precision: str) -> float:
    """Return the largest relative error of rounding to nearest: 2^-24 in float32."""
    return 2.0 ** -FORMATS[precision][0]


def ulp(x: np.ndarray, precision: str) -> np.ndarray:
    """Return the unit in the last place of each number in a precision: the gap from |x| up to the next larger number.

    Numbers below the smallest normal one share its gap, as subnormals do.    float64, any shape
    """
    bits, smallest = FORMATS[precision]
    _, exponent = np.frexp(x)  # |x| = m · 2^exponent with m in [0.5, 1)
    exponent = np.where(x == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.ldexp(1.0, exponent - (bits - 1))


def measure(candidate: np.ndarray, reference: np.ndarray, precision: str, logits: bool = False) -> Metrics:
    """Compute all metrics of two arrays of the same shape; elements that are not finite in both are left out."""
    c, r = candidate.astype(np.float64), reference.astype(np.float64)
    if logits:
        kl, top1, top5 = logit_metrics(c, r) if np.isfinite(c).all() and np.isfinite(r).all() else (None, None, None)
    both = np.isfinite(c) & np.isfinite(r)
    c, r = c[both], r[both]
    if not c.size:
        return Metrics(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # an overflow to infinity is what it says
        d = np.abs(c - r)
        relative = np.where(d == 0, 0.0, d / np.abs(r))
        in_ulp = d / ulp(r, precision)
        error, size, other = np.sum(d * d), np.sum(r * r), np.sum(c * c)
        nmse = 0.0 if error == 0 else error / size
        if size and other:
            cosine = np.sum(c * r) / np.sqrt(size * other)
        else:
            cosine = float(size == other)
        return Metrics(
            max_abs=float(d.max()),
            max_rel=float(relative.max()),
            rms=float(np.sqrt(error / d.size)),
            nmse=float(nmse),
            cosine=float(cosine),
            max_ulp=float(in_ulp.max()),
            median_ulp=float(np.median(in_ulp)),
            **({"kl": kl, "top1": top1, "top5": top5} if logits else {}),
        )


def logit_metrics(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Compute KL divergence, top-1 and top-5 agreement, the mean over tokens.    [..., V], float64"""
    c, r = _log_softmax(candidate), _log_softmax(reference)
    kl = np.sum(np.exp(r) * (r - c), axis=-1)
    n = min(TOP, c.shape[-1])
    best_c, best_r = (np.argsort(-x, axis=-1, kind="stable")[..., :n] for x in (candidate, reference))
    shared = (best_c[..., :, None] == best_r[..., None, :]).any(-1)
    return float(kl.mean()), float((best_c[..., 0] == best_r[..., 0]).mean()), float(shared.mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
