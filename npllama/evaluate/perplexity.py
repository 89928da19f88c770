"""Perplexity of a model on a text, and divergence of its predictions from another model's, as llama.cpp defines them.

The text's ids are cut into windows of n that don't overlap; an incomplete window at the end is dropped. Where the tokenizer
puts BOS before a text, BOS replaces the first token of each window. Counted from 0, the tokens n/2 + 1 ... n - 1 of a window
are scored: the model predicts each from all tokens before it in the window.
Source: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..cache import KVCache
from ..checkpoint import Model
from ..generation import PREFILL_CHUNK, prefill
from ..model import check_tokens, forward
from ..sampling import checked, log_probabilities

Progress = Callable[[int], object]
ROWS = 64  # positions whose float64 log-probabilities are in memory at once


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error, sqrt(variance / (count - 1)), which is 0 for one token."""

    value: float
    error: float

    @staticmethod
    def of(values: np.ndarray) -> Mean:
        """Return the mean of values [N]."""
        return Mean(float(np.mean(values)), float(np.std(values) / math.sqrt(max(1, len(values) - 1))))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens, whose natural logarithms are nll [N]."""

    nll: np.ndarray

    @property
    def value(self) -> float:
        """Return the perplexity: infinite where a token was impossible."""
        with np.errstate(over="ignore"):
            return float(np.exp(Mean.of(self.nll).value))

    @property
    def error(self) -> float:
        """Return its standard error: that of the mean logarithm, times the perplexity."""
        return Mean.of(self.nll).error * self.value


@dataclass(frozen=True)
class Comparison:
    """A model's predictions compared with those of a base on the same tokens, as of a quantised model with its original."""

    model: Perplexity
    base: Perplexity
    kl: np.ndarray  # [N], nats: sum over the vocabulary of p_base · (ln p_base - ln p_model)
    same_top: np.ndarray  # bool [N]: the same token is the most likely in both


def perplexity(model: Model, tokens: Sequence[int], context: int = 512, progress: Progress | None = None) -> Perplexity:
    """Score a text's ids in windows of `context`. progress is called with the number of tokens just scored.

    Raises ValueError for fewer ids than one window, for a window that the model's context doesn't hold, and for logits that are
    NaN or infinite.
    """
    windows = make_windows(model, tokens, context)
    nll = []
    for window in windows:
        for rows, targets in scored_rows(model, window):
            nll.append(-_at(log_probabilities(rows), targets))
        if progress:
            progress(context)
    return Perplexity(np.concatenate(nll))


def compare(
    model: Model, base: Model, tokens: Sequence[int], context: int = 512, progress: Progress | None = None
) -> Comparison:
    """Score both models on the same windows, and measure the Kullback-Leibler divergence of the model from the base.

    Raises ValueError as perplexity() does, and for models of different vocabulary.
    """
    if model.config.vocab_size != base.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {base.config.vocab_size}"
        raise ValueError(f"the models' vocabularies have {sizes} tokens: only models with the same vocabulary can be compared")
    make_windows(base, tokens, context)
    found: list[tuple[np.ndarray, ...]] = []
    for window in make_windows(model, tokens, context):
        for (rows, targets), (base_rows, _) in zip(scored_rows(model, window), scored_rows(base, window), strict=True):
            ours, theirs = log_probabilities(rows), log_probabilities(base_rows)
            kl = np.sum(np.exp(theirs) * (theirs - ours), axis=-1)
            same_top = np.argmax(ours, axis=-1) == np.argmax(theirs, axis=-1)
            found.append((-_at(ours, targets), -_at(theirs, targets), kl, same_top))
        if progress:
            progress(context)
    nll, base_nll, kl, same_top = map(np.concatenate, zip(*found, strict=True))
    return Comparison(Perplexity(nll), Perplexity(base_nll), kl, same_top)


def make_windows(model: Model, tokens: Sequence[int], context: int) -> np.ndarray:
    """Cut the scored windows, the first token of each replaced by BOS where the tokenizer adds one.    -> int [N, n]"""
    if not 3 <= context <= model.config.max_seq_len:
        raise ValueError(f"a window of {context} tokens: expected 3 to {model.config.max_seq_len}, the model's context")
    if len(tokens) < context:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least one window of {context}")
    n = len(tokens) // context
    windows = check_tokens(tokens[: n * context], model.config).reshape(n, context).copy()
    if model.tokenizer is not None and model.tokenizer.adds_bos:
        windows[:, 0] = model.tokenizer.bos_id
    return windows


def scored_rows(model: Model, window: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the logits that predict the second half of a window, and the ids they should predict, block by block.

    int [n] -> ([rows, V], int [rows]) ...
    """
    first, cache = len(window) // 2, KVCache(model.config)
    prefill(model, window[:first], cache)  # nothing of this half is scored
    for start in range(first, len(window) - 1, PREFILL_CHUNK):
        end = min(start + PREFILL_CHUNK, len(window) - 1)
        logits = forward(model.params, model.config, window[start:end], cache, ops=model.ops)
        for row in range(start, end, ROWS):
            stop = min(row + ROWS, end)
            yield checked(logits[row - start : stop - start]), window[row + 1 : stop + 1]


def _at(log_probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]
