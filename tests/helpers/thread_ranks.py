"""Run ranks in threads of this process, so that tests see what each computes without starting processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from npllama import Config
from npllama.engine.ranks import shares
from npllama.engine.ranks.groups import Message
from npllama.engine.ranks.leading import Leader, Part, follow
from npllama.engine.ranks.passes import Spread
from npllama.golden.precision import named


class ThreadGroup:
    """One rank, in a thread. Every sum is kept in `sums`, so that ranks can be compared."""

    def __init__(self, rank: int, size: int, board: list, meeting: threading.Barrier, messages: Sequence[queue.SimpleQueue]):
        self.rank, self.size, self._board, self._meeting, self._messages = rank, size, board, meeting, messages
        self._turn, self.running = 0, True
        self.sums: list[np.ndarray] = []
        self.errors: list[BaseException] = []

    def everyones(self, x: np.ndarray) -> list[np.ndarray]:
        board = self._board[self._turn]  # two boards alternate, so that one barrier per sum is enough
        self._turn = 1 - self._turn
        board[self.rank] = np.array(x)
        self._meeting.wait(60)
        return list(board)

    def total(self, x: np.ndarray) -> np.ndarray:
        first, *others = self.everyones(x)
        for other in others:
            first = first + other
        self.sums.append(first)
        return first.copy()

    def gather(self, x: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        found = self.everyones(x)
        assert [y.shape[-1] for y in found] == list(sizes)
        return np.concatenate(found, axis=-1)

    def broadcast(self, x: np.ndarray) -> np.ndarray:
        return self.everyones(x)[0].copy()

    def send(self, message: Message) -> None:
        for messages in self._messages[1:]:
            messages.put(message)

    def receive(self) -> Message | None:
        return self._messages[self.rank].get()

    def report(self, error: BaseException) -> None:
        self.errors.append(error)
        self._meeting.abort()

    def abandon(self) -> None:
        self._meeting.abort()

    def close(self) -> None:
        for messages in self._messages[1:]:
            messages.put(None)


def groups(size: int) -> list[ThreadGroup]:
    """Return one group object for each rank."""
    board, meeting, messages = (
        [[None] * size, [None] * size],
        threading.Barrier(size),
        [queue.SimpleQueue() for _ in range(size)],
    )
    return [ThreadGroup(rank, size, board, meeting, messages) for rank in range(size)]


def spread(params: Mapping, config: Config, size: int) -> tuple[Spread, list[ThreadGroup]]:
    """Return the parameters of rank 0, whose passes the other ranks follow in threads, and the groups of all ranks."""
    ranks = groups(size)
    parts = []
    for share, group in zip(shares.shares(config, size), ranks, strict=True):
        parts.append(Part(config, shares.joined(shares.cut(params, config, share), config, group), group))
    for part in parts[1:]:
        threading.Thread(target=follow, args=(part, part.group, named), daemon=True).start()
    leader = Leader(parts[0], parts[0].group)
    return Spread(parts[0].params, leader.forward, params), ranks
