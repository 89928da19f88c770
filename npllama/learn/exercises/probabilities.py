"""Exercise 9, probabilities: temperature and top-p."""

from __future__ import annotations

import math

import numpy as np

from ... import ops
from ...sampling import Sampling, probabilities
from .exercise import Exercise, floats


def cases() -> list[tuple]:
    """Return unsorted logits at several temperatures; one token that alone reaches top_p; top_p = 1; and an exact edge.

    At (2.0, 0.8) and (0.5, 0.75) top_p keeps other tokens than it would without the temperature, 4 and 2 instead of 3. The last
    case is 1/2, 1/4 and 1/4, to the bit, in float32 and in float64: the first token reaches 1/2 exactly.
    """
    logits = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)) + 2
    halves = np.array([-1, 0, -1], np.float32)
    settings = [(1.0, 0.6), (0.7, 0.8), (2.0, 0.5), (2.0, 0.8), (0.5, 0.75), (1.0, 0.3)]
    return [*((logits, *pair) for pair in settings), (logits * 1000, 1.0, 1.0), (halves, 1 / math.log(2), 0.5)]


def reference(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Call sampling.probabilities() with these settings."""
    return probabilities(logits, Sampling(temperature, top_p=top_p))


def kept(p: np.ndarray, top_p: float, order: np.ndarray) -> np.ndarray:
    """Keep the first tokens of an order that together reach top_p."""
    kept = p.copy()
    kept[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
    return kept / np.sum(kept)


def small() -> list[tuple]:
    """Return two logits at several temperatures; three at several top_p, sorted and not; a large one; the edge of cases()."""
    pair, three = floats(1, 0), floats(2, 1, 0)
    return [
        *((pair, temperature, 1.0) for temperature in (1.0, 2.0)),
        *((three, *setting) for setting in ((1.0, 0.5), (1.0, 0.7), (2.0, 0.6))),
        (floats(0, 1, 2), 1.0, 0.7),
        (floats(1000, 0), 1.0, 1.0),
        cases()[-1],
    ]


EXERCISE = Exercise(
    name="probabilities",
    arguments="logits, temperature, top_p",
    statement="""\
Compute the distribution that the next token is drawn from.

    p = softmax(logits / temperature); of the most likely tokens keep the fewest that together reach top_p;
    the others get 0, and the rest sums to 1 again        logits [V] -> [V]

At least one token is always kept, and top_p = 1 keeps all. The result may be float32 or float64.""",
    real="sampling.probabilities",
    reference=reference,
    cases=cases,
    mistakes=(
        "top_p_early",
        "top_p_early_but_first",
        "top_p_late",
        "top_p_before_temperature",
        "top_p_unsorted",
        "temperature_multiplies",
        "no_temperature",
        "top_p_unnormalised",
        "no_top_p",
        "sampling_overflow",
    ),
    variants={
        "the least likely tokens are kept: sort from the most likely, np.argsort(-p)": lambda x, t, top_p: kept(
            ops.softmax(x / t), top_p, np.argsort(ops.softmax(x / t), kind="stable")
        ),
        "the result is in the order of the probabilities: each belongs at its token's id": lambda x, t, top_p: np.sort(
            reference(x, t, top_p)
        )[::-1],
    },
    small=small,
    any_float=True,
)
