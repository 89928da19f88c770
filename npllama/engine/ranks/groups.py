"""What a group of ranks can do. Every rank calls the same methods in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import NpllamaError

Message = dict[str, Any]  # of JSON's types


class RankError(NpllamaError):
    """A rank has failed or ended; the message names it."""


class Abandoned(NpllamaError):
    """Rank 0 has given up the pass under way: the other ranks forget it."""


class Group(Protocol):
    """Ranks that compute together."""

    rank: int
    size: int

    def total(self, x: np.ndarray) -> np.ndarray:
        """Return the sum of every rank's x, the same bits on all.    any shape, float32 or float64"""

    def gather(self, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """Return every rank's x side by side along the last axis.    [..., sizes[rank]] -> [..., sum(sizes)]"""

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        """Return rank 0's x. The other ranks' have its shape."""

    def send(self, message: Message) -> None:
        """As rank 0, tell the other ranks what is to be done next."""

    def receive(self) -> Message | None:
        """As another rank, wait for the next message; None when rank 0 has ended."""

    def report(self, error: BaseException) -> None:
        """As another rank, tell rank 0 that the pass under way has failed here."""

    def abandon(self) -> None:
        """As rank 0, give up the pass under way, so that the other ranks stop waiting for it."""

    def close(self) -> None:
        """As rank 0, end the other ranks."""
