"""Exercise 17, draw: one token by chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np

from ...sampling import Sampling, sample
from .exercise import Exercise


def cases() -> list[tuple]:
    """Return draws from distributions in no order; one at 0 where token 0 has no probability; one past the most likely."""
    p = np.array([0.1, 0.2, 0.4, 0.3])
    first_is_zero = np.array([0.0, 0.5, 0.5])
    return [(p, 0.05), (p, 0.15), (p, 0.65), (p, 0.95), (first_is_zero, 0.0), (np.array([0.7, 0.1, 0.2]), 0.75)]


def reference(p: np.ndarray, u: float) -> int:
    """Call sampling.sample() with logits of these probabilities and a generator that draws u."""
    generator = cast(np.random.Generator, SimpleNamespace(random=lambda: u))
    with np.errstate(divide="ignore"):
        return sample(np.log(p), Sampling(1.0), generator)


def by_likelihood(p: np.ndarray) -> np.ndarray:
    """Return the ids, the most likely first."""
    return np.argsort(-p, kind="stable")


def small() -> list[tuple]:
    """Return draws of each of three tokens, and a first token of probability 0."""
    p = np.array([0.25, 0.5, 0.25])
    return [(p, 0.1), (p, 0.3), (p, 0.8), (np.array([0.0, 1.0]), 0.0)]


EXERCISE = Exercise(
    name="draw",
    arguments="p, u",
    statement="""\
Draw a token: the first id at which the probabilities, added up in the order of the ids, exceed u.

    id = min {i : p[0] + p[1] + ... + p[i] > u}        p [V], 0 <= u < 1 -> a whole number

If u is drawn evenly from [0, 1), each id is drawn with its probability; one of probability 0 never is.""",
    real="sampling.sample",
    reference=reference,
    cases=cases,
    variants={
        "this is always the most likely token": lambda p, u: np.argmax(p),
        "the sum must exceed u: where it only reaches u, a token of probability 0 can be drawn": lambda p, u: np.searchsorted(
            np.cumsum(p), u
        ),
        "the place among the sorted probabilities is returned: return the token's id": lambda p, u: np.searchsorted(
            np.cumsum(p[by_likelihood(p)]), u, side="right"
        ),
        "the most likely tokens come first: here the order is that of the ids": lambda p, u: by_likelihood(p)[
            np.searchsorted(np.cumsum(p[by_likelihood(p)]), u, side="right")
        ],
        "single probabilities are compared with u: add them up first, np.cumsum(p)": lambda p, u: np.argmax(p > u),
        "the id is one too small": lambda p, u: np.searchsorted(np.cumsum(p), u, side="right") - 1,
        "the id is one too large": lambda p, u: np.searchsorted(np.cumsum(p), u, side="right") + 1,
    },
    small=small,
)
