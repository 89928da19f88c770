"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import NpllamaError


class LogitsError(NpllamaError):
    """Logits from which no token can be drawn: some are NaN or inf, or all are -inf, which excludes a token."""


@dataclass(frozen=True)
class Sampling:
    """The sampling settings. They apply in this order, each to the tokens that the previous one kept.

    repetition_penalty  divides the positive logits of ids that came before and multiplies the negative ones; 1 changes nothing
                 (Keskar et al. 2019, arXiv:1909.05858, as Hugging Face's RepetitionPenaltyLogitsProcessor)
    temperature  divides the logits; 0 is greedy: always the most likely token, the first of equals
    top_k        keep the k most likely; 0 keeps all
    top_p        keep the most likely that together reach this probability; 1 keeps all (Holtzman et al. 2019, arXiv:1904.09751)
    min_p        keep tokens at least this fraction as likely as the likeliest; 0 keeps all
                 (Nguyen et al. 2024, arXiv:2407.01082)

    Raises ValueError for a setting out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}, expected 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected more than 0 (1 changes nothing)")


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the distribution that a token is drawn from, in float64.    [V] -> [V], sums to 1"""
    logits = checked(logits).astype(np.float64)
    if sampling.temperature == 0:
        return np.eye(1, len(logits), int(np.argmax(logits)))[0]
    scaled = logits - logits.max()
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
        scaled /= sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order])  # the most likely first, as 1
    if sampling.top_k:
        p[sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = np.cumsum(p) - p  # the sum over more likely tokens
        p[before >= sampling.top_p * p.sum()] = 0
    p[p < sampling.min_p] = 0
    result = np.empty_like(p)
    result[order] = p / p.sum()
    return result


def sample(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator, before: Sequence[int] = ()) -> int:
    """Draw the next token's id; the repetition penalty applies to the ids in `before`.    [V] -> int"""
    logits = penalised(checked(logits), before, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(probabilities(logits, sampling))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def penalised(logits: np.ndarray, before: Sequence[int], penalty: float) -> np.ndarray:
    """Return the logits with a penalty on each id that came before, however often: less likely above 1.    [V] -> [V]"""
    if penalty == 1 or not len(before):
        return logits
    ids = np.unique(before)
    y = logits.copy()
    y[ids] = np.where(y[ids] < 0, y[ids] * penalty, y[ids] / penalty)
    return y


def checked(logits: np.ndarray) -> np.ndarray:
    """Return the logits if a token can be drawn from each row, else raise LogitsError.    [..., V] -> [..., V]"""
    # NaN and inf are the maximum wherever they stand, -inf only where it stands alone.
    if not np.all(np.isfinite(np.max(logits, axis=-1))):
        counts = {"NaN": np.isnan(logits), "inf": np.isposinf(logits), "-inf": np.isneginf(logits)}
        found = ", ".join(f"{np.count_nonzero(where):,} are {name}" for name, where in counts.items() if where.any())
        raise LogitsError(f"of {logits.size:,} logits {found}, expected numbers (or -inf, but not for all)")
    return logits


def likeliest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k largest values, the largest first, ties in order of index.    [V] -> int [k]"""
    if not 0 < k < len(values):
        return np.argsort(-values, kind="stable")[:k]
    least = np.partition(values, -k)[-k]  # sorting a whole vocabulary takes several times as long
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")[:k]]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of the model's distribution, before any sampling, in float64.    [..., V] -> [..., V]"""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
