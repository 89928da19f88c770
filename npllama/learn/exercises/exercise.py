"""The parts of an exercise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...golden.mistakes import MISTAKES


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    name, arguments   of the function that the student's file defines
    statement         a sentence, the formula, the shapes
    real              where npllama has the function, `module.function`
    reference         the solution: the same arguments and `rest`, right result
    cases             the arguments of each call; every call of `cases` returns new arrays of the same numbers
    mistakes          the usual ones, by their names in the list of mistakes
    rest              further arguments of the reference, which the student's function doesn't take
    any_float         whether float64 is as good as float32
    in_place          whether it is meant to write into its arguments
    """

    name: str
    arguments: str
    statement: str
    real: str
    reference: Callable[..., np.ndarray]
    cases: Callable[[], list[tuple]]
    mistakes: tuple[str, ...]
    rest: tuple = ()
    any_float: bool = False
    in_place: bool = False

    @property
    def summary(self) -> str:
        """The statement's first line."""
        return self.statement.splitlines()[0]

    @property
    def hints(self) -> dict[str, Callable[..., np.ndarray]]:
        """The sentence of each usual mistake, and the wrong function that recognises it."""
        found = {}
        for mistake in map(MISTAKES.__getitem__, self.mistakes):
            wrong = mistake.function(self.name)
            if wrong is None:
                raise KeyError(f"{mistake.name} is no mistake in {self.name}")
            found[mistake.sentence] = wrong
        return found


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw random float32 numbers, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
