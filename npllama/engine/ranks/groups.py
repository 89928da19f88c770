"""Define the operations of a group of ranks. Every rank calls the same methods in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import NpllamaError, reason

Message = dict[str, Any]  # of JSON's types


class RankError(NpllamaError):
    """A rank has failed or ended; the message names it."""


class RankLost(RankError):
    """A rank has ended, or waits where no message reaches it: no further pass is possible."""


class Abandoned(NpllamaError):
    """Rank 0 has abandoned the pass under way: the other ranks discard it."""


class Group(Protocol):
    """Ranks that compute together."""

    rank: int
    size: int
    running: bool  # whether a pass is under way: outside of one, sums are refused

    def total(self, x: np.ndarray) -> np.ndarray:
        """Return the sum of every rank's x, the same bits on all.    any shape, float32 or float64"""

    def gather(self, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """Return every rank's x side by side along the last axis.    [..., sizes[rank]] -> [..., sum(sizes)]"""

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        """Return rank 0's x; each rank gives an array of the same shape."""


class Leading(Group, Protocol):
    """The operations that rank 0 has in addition."""

    def send(self, message: Message) -> None:
        """Send the other ranks a message: the next pass."""

    def abandon(self) -> None:
        """Abandon the pass under way, so that the other ranks stop waiting for it."""

    def check(self) -> None:
        """Raise RankLost if another rank has ended; for use between passes."""

    def close(self) -> None:
        """End the other ranks."""


class Following(Group, Protocol):
    """The operations that the other ranks have in addition."""

    def receive(self) -> Message | None:
        """Wait for the next message; None when rank 0 has ended."""

    def report(self, error: BaseException) -> None:
        """Tell rank 0 that the pass under way has failed here."""


def described(error: BaseException) -> str:
    """Return an error in one line, with its type unless it is one whose message is for users."""
    return reason(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {reason(error)}"
