"""Functions for students to write, a file each: statement, reference, cases, usual mistakes.

The first ten lead from softmax to the KV cache; the others belong to the course (docs/course/), which uses all of them.

The usual mistakes come from golden/mistakes.py: grading.py compares a student's numbers with those of each wrong function. The
references are the functions that the model itself runs. Shapes use the dimension key of model.py.
"""

from __future__ import annotations

from . import (
    attention_heads,
    attention_scores,
    byte_pair,
    cache_bytes,
    cache_update,
    causal_mask,
    draw,
    linear,
    probabilities,
    relative_error,
    rms_norm,
    rope,
    rope_frequencies,
    round_bfloat16,
    scaled_rope,
    softmax,
    surprise,
    swiglu,
)
from .exercise import Exercise

EXERCISES: tuple[Exercise, ...] = (
    softmax.EXERCISE,
    rms_norm.EXERCISE,
    rope_frequencies.EXERCISE,
    rope.EXERCISE,
    causal_mask.EXERCISE,
    attention_scores.EXERCISE,
    attention_heads.EXERCISE,
    swiglu.EXERCISE,
    probabilities.EXERCISE,
    cache_update.EXERCISE,
    linear.EXERCISE,
    byte_pair.EXERCISE,
    scaled_rope.EXERCISE,
    cache_bytes.EXERCISE,
    round_bfloat16.EXERCISE,
    relative_error.EXERCISE,
    draw.EXERCISE,
    surprise.EXERCISE,
)


def find(name: str) -> Exercise:
    """Find the exercise of this name. Raises ValueError where there is none."""
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    raise ValueError(f"there is no exercise {name!r}: expected one of {', '.join(exercise.name for exercise in EXERCISES)}")
