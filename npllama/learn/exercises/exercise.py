"""Define an exercise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...golden.mistakes import MISTAKES

Result = np.ndarray | np.generic | float  # an int is a float to type checkers


@dataclass(frozen=True)
class Exercise:
    """A function for the student to write.

    name, arguments   of the function that the student's file defines
    statement         a sentence, the formula, the shapes
    real              npllama's own function, `module.function`
    reference         the solution; it takes the same arguments, then `rest`
    cases             the arguments of each call; every call of cases() returns new arrays with the same numbers
    mistakes          names of the usual ones in golden/mistakes.py
    variants          further wrong functions that this exercise alone recognises: sentence -> function
    small             inputs of a few numbers, the smallest first, run in order: the first that fails is shown in full
    rest              further arguments that only the reference takes
    any_float         whether float64 is as good as float32
    in_place          whether the function has to write into its arguments
    """

    name: str
    arguments: str
    statement: str
    real: str
    reference: Callable[..., Result]
    cases: Callable[[], list[tuple]]
    mistakes: tuple[str, ...] = ()
    rest: tuple = ()
    variants: Mapping[str, Callable[..., Result]] = field(default_factory=dict)
    small: Callable[[], list[tuple]] = list
    any_float: bool = False
    in_place: bool = False

    @property
    def summary(self) -> str:
        """Return the statement's first line."""
        return self.statement.splitlines()[0]

    @property
    def hints(self) -> dict[str, Callable[..., Result]]:
        """Map the sentence of each recognised mistake to its wrong function."""
        found: dict[str, Callable[..., Result]] = {}
        for mistake in map(MISTAKES.__getitem__, self.mistakes):
            wrong = mistake.function(self.name)
            if wrong is None:
                raise KeyError(f"{mistake.name} is no mistake in {self.name}")
            found[mistake.sentence] = wrong
        return found | dict(self.variants)


def floats(*numbers: object) -> np.ndarray:
    """Make a float32 array of numbers or of nested lists."""
    return np.array(numbers, np.float32)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw random float32 numbers, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
