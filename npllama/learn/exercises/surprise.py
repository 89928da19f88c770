"""Exercise 18, surprise: how well a model predicts a text."""

from __future__ import annotations

import numpy as np

from ...sampling import log_probabilities
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return ordinary logits, a text of two tokens, and logits so far apart that exp overflows and vanishes."""
    apart = normal(3, 4, 5) + np.array([1000, 0, -1000, 0, 1000], np.float32) + np.array([[0], [3000], [0], [0]], np.float32)
    return [
        (normal(1, 6, 7) * 2, np.array([3, 0, 6, 6, 1, 4])),
        (normal(2, 2, 5), np.array([4, 2])),
        (apart, np.array([1, 3, 0, 2])),
    ]


def surprises(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return minus the log-probability that each row gives to the id at the same place.    [N, V], int [N] -> [N]"""
    return -np.take_along_axis(log_probabilities(logits), ids[:, None], axis=-1)[:, 0]


def reference(logits: np.ndarray, ids: np.ndarray) -> float:
    """Average over the tokens that a row predicts: all but the first."""
    return float(np.mean(surprises(logits[:-1], ids[1:])))


def of_quotients(logits: np.ndarray, ids: np.ndarray) -> float:
    """Take the logarithm of the softmax, which is 0 for a token far below the largest."""
    e = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    p = e / np.sum(e, axis=-1, keepdims=True)
    return float(np.mean(-np.log(p[np.arange(len(ids) - 1), ids[1:]])))


def overflowing(logits: np.ndarray, ids: np.ndarray) -> float:
    """Take the logarithm of the softmax without subtracting the largest logit."""
    e = np.exp(logits)
    p = e / np.sum(e, axis=-1, keepdims=True)
    return float(np.mean(-np.log(p[np.arange(len(ids) - 1), ids[1:]])))


def of_one_maximum(logits: np.ndarray, ids: np.ndarray) -> float:
    """Subtract the largest of all logits from each row."""
    z = logits - np.max(logits)
    log_p = z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))
    return float(np.mean(-log_p[np.arange(len(ids) - 1), ids[1:]]))


def small() -> list[tuple]:
    """Return two tokens, three tokens, two of which the second is nearly impossible, and two whose rows are far apart."""
    return [
        (floats([0, 2], [3, 0]), np.array([0, 1])),
        (floats([0, 2], [3, 0], [1, 0]), np.array([0, 1, 0])),
        (floats([0, 2000], [0, 0]), np.array([1, 0])),
        (floats([0, 1], [2000, 2000]), np.array([0, 1])),
    ]


EXERCISE = Exercise(
    name="surprise",
    arguments="logits, ids",
    statement="""\
Measure how well a model predicts a text: the mean surprise, in nats, at each token but the first.

    surprise = mean of -log p_t[ids[t+1]], t = 0 ... T-2        p_t = softmax(logits[t])

    logits [T, V], row t computed from ids[0] ... ids[t]; ids int [T], T at least 2 -> a number

log p[i] = z[i] - m - log(sum(exp(z - m))), where z is the row of logits and m its largest, is safe even where p[i] is too small
for a float. The result may be float32 or float64.""",
    real="sampling.log_probabilities",
    reference=reference,
    cases=cases,
    variants={
        "each row is compared with its own token: row t predicts token t + 1, so use logits[:-1] and ids[1:]": lambda z, ids: (
            float(np.mean(surprises(z, ids)))
        ),
        "each row is compared with its own token, and the last is left out: row t predicts token t + 1, ids[1:]": (
            lambda z, ids: float(np.mean(surprises(z[:-1], ids[:-1])))
        ),
        "each row is compared with the token before it: row t predicts token t + 1, so use logits[:-1] and ids[1:]": (
            lambda z, ids: float(np.mean(surprises(z[1:], ids[:-1])))
        ),
        "the sign is wrong: a logarithm of a probability is negative, and surprise is minus that": lambda z, ids: (
            -reference(z, ids)
        ),
        "these are bits, by the logarithm to base 2: nats have the natural one, np.log": lambda z, ids: (
            reference(z, ids) / float(np.log(2))
        ),
        "the surprises are summed: take their mean": lambda z, ids: reference(z, ids) * (len(ids) - 1),
        "the sum is divided by T: only T - 1 tokens are predicted, since the first has nothing before it": lambda z, ids: (
            reference(z, ids) * (len(ids) - 1) / len(ids)
        ),
        "this is the perplexity, exp of the surprise": lambda z, ids: float(np.exp(reference(z, ids))),
        "the logarithm is taken of the mean probability: take the mean of the logarithms": lambda z, ids: float(
            -np.log(np.mean(np.exp(-surprises(z[:-1], ids[1:]))))
        ),
        "every id is taken from every row: give the rows too, log_p[np.arange(T - 1), ids[1:]]": lambda z, ids: float(
            np.mean(-log_probabilities(z[:-1])[:, ids[1:]])
        ),
        "the maximum is that of the whole array: where a row lies far below it, all its exp are 0; take each row's own": (
            of_one_maximum
        ),
        "exp overflows at large logits, and inf / inf is NaN: compute log p as z - m - log(sum(exp(z - m)))": overflowing,
        "exp is inf at a large logit or 0 at one far below: compute log p as z - m - log(sum(exp(z - m)))": of_quotients,
    },
    small=small,
    any_float=True,
)
