"""Exercise 5, causal_mask: the keys that each query may attend to."""

from __future__ import annotations

import numpy as np

from ... import ops
from .exercise import Exercise


def cases() -> list[tuple]:
    """Return a prompt, one token after it, and a chunk of three after it; and a cache whose slots are not in order."""
    prompt, decode, chunk = (np.arange(5), np.arange(5)), (np.array([5]), np.arange(6)), (np.arange(5, 8), np.arange(8))
    return [prompt, decode, chunk, (np.array([1, 2]), np.array([2, 0, 1]))]


def small() -> list[tuple]:
    """Return one query and one slot; two of each; decode; slots that are not in order."""
    positions = [([0], [0]), ([0], [1]), ([1], [0, 1]), ([0, 1], [0, 1]), ([1, 2], [2, 0])]
    return [(np.array(queries), np.array(slots)) for queries, slots in positions]


EXERCISE = Exercise(
    name="causal_mask",
    arguments="query_positions, slot_positions",
    statement="""\
Make the causal mask: 0 where a query may attend to a slot, -inf where the slot's position is after its own.

    mask = 0 where slot_positions <= query_positions, else -inf

    query_positions int [T], slot_positions int [S] -> float32 [1, T, S]; the 1 stands for all heads

In decoding, T is 1 and S is all tokens so far. Slots need not be in order.""",
    real="ops.causal_mask",
    reference=ops.causal_mask,
    cases=cases,
    mistakes=(
        "mask_one_late",
        "mask_one_early",
        "mask_one_early_but_first",
        "mask_reversed",
        "mask_of_indices",
        "mask_of_slots",
        "mask_of_ones",
        "mask_large_number",
        "mask_lowest_number",
        "mask_wrong_sign",
        "mask_multiplied",
        "mask_multiplied_reversed",
        "mask_axes_exchanged",
    ),
    variants={
        "visible keys are masked, and later ones are not: exchange 0 and -inf": lambda q, s, dtype: np.where(
            s[None, :] <= q[:, None], np.asarray(-np.inf, dtype), np.asarray(0, dtype)
        )[None],
    },
    small=small,
    rest=(np.float32,),
)
