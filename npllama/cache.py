"""The keys and values of every token so far, so that each is computed once.

A cache holds one sequence, or rows that come and go independently, as a server needs them:

    cache = KVCache(config, (8,), capacity=2048)           # eight empty rows
    logits = prefill(model, prompt, cache[3])              # a prompt joins in row 3: cache[3] is a cache of one sequence
    forward(params, config, tokens, cache.only(running))   # int [8, 1]: one token for each running row, -1 for the others
    cache[3].truncate(20)                                  # row 3 is cut back to its first 20 slots
    cache[3].truncate(0)                                   # and leaves: the row is free for the next prompt

cache[3] and cache[2:5] are views that share its memory, as slices of a NumPy array are. No row is copied or moved when another
joins, grows or leaves, except when memory grows past `capacity`. Rows of different lengths go through one pass, which reads as
many slots of each row as the longest has: slots after a row's end hold the position PADDING, and the comparison that masks the
future masks them too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .config import Config

PADDING = 1 << 30  # the position of a slot without a token: after every real one, so no query reaches it


class KVCache:
    """Keys and values per layer, and the position that each slot holds.

    positions  int64 [..., S]       PADDING where the token was padding, and after a row's end
    keys       [..., G, S, K] per layer, after RoPE
    values     [..., G, S, K] per layer

    One forward pass calls extend() once, update() once a layer, and commit() at its end: a pass that is interrupted leaves the
    cache as it was. Memory grows by doubling, for all rows at once, and has `capacity` slots a row from the first pass on.
    """

    def __init__(self, config: Config, batch_shape: tuple[int, ...] = (), capacity: int = 0):
        self.max_seq_len = config.max_seq_len
        self._memory = _Memory(config.n_layers, batch_shape, capacity)
        self._at: tuple[int | slice, ...] = ()  # from all rows to those of this view, one index after the other
        self._active: np.ndarray | None = None  # bool [...]: the rows that a pass extends; None for all
        self._lengths = np.zeros(batch_shape, np.int64)  # slots committed
        self._ends = np.zeros(batch_shape, np.int64)  # slots including those of the pass under way
        self._n_tokens = np.zeros(batch_shape, np.int64)
        self._settle()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Return the shape of the rows; () for one sequence."""
        return self._lengths.shape

    @property
    def lengths(self) -> np.ndarray:
        """Return how many slots each row fills, padding included.    int64 [...]"""
        return self._lengths.copy()

    @property
    def length(self) -> int:
        """Return how many slots the longest row fills, padding included."""
        return int(self._lengths.max(initial=0))

    @property
    def n_tokens(self) -> np.ndarray:
        """Return how many tokens each row holds, without padding.    int64 [...]"""
        return self._n_tokens.copy()

    @property
    def positions(self) -> np.ndarray:
        """Return the position of every slot, the new ones included.    int64 [..., S]"""
        return self._rows(self._memory.positions)[..., : int(self._ends.max(initial=0))]

    @property
    def view(self) -> tuple[_Memory, tuple[int | slice, ...], np.ndarray | None]:
        """Return the memory, the indices of this view's rows in it, and which of these rows are active (None: all).

        Views of one cache share their memory. With these, another rank's cache can follow this one (engine/ranks/leading.py).
        """
        return self._memory, self._at, self._active

    def __getitem__(self, rows: int | slice) -> KVCache:
        """Return a view of one row, as a cache of one sequence, or of a range of rows.

        Raises IndexError for a row that isn't there, and TypeError for anything but a number or a slice.
        """
        if not self.batch_shape or not isinstance(rows, int | np.integer | slice):
            found = f"an index of type {type(rows).__name__}" if self.batch_shape else "an index of a cache of one sequence"
            raise TypeError(f"found {found}, expected a row's number or a slice of a cache of several rows")
        view = self._alike()
        view._at = (*self._at, rows)
        view._lengths, view._ends, view._n_tokens = (x[rows, ...] for x in (self._lengths, self._ends, self._n_tokens))
        view._active = None if self._active is None else self._active[rows, ...]
        view._settle()
        return view

    def only(self, active: ArrayLike) -> KVCache:
        """Return a view of the same rows in which a pass extends those that are true.    bool [...]

        The others take part in the pass as padding and stay as they are. Raises ValueError for another shape, or if none is
        true.
        """
        view = self._alike()
        view._active = np.array(active, dtype=bool)
        if view._active.shape != self.batch_shape:
            raise ValueError(f"active rows have shape {view._active.shape}, but the cache was made for {self.batch_shape}")
        if not view._active.any():
            raise ValueError("no row is active, expected at least one")
        view._settle()
        return view

    def truncate(self, length: ArrayLike) -> None:
        """Forget all slots from `length` on: one number, or one for each row. Raises ValueError for a negative one."""
        kept = np.minimum(self._lengths, length)
        if kept.min(initial=0) < 0:
            raise ValueError(f"length is {length!r}, expected 0 or more")
        for row in np.ndindex(self.batch_shape):
            if self._ends[row] > kept[row]:
                self._forget(row, int(kept[row]), int(self._ends[row]))
        self._lengths[...] = self._ends[...] = kept
        self._settle()

    def extend(self, is_token: np.ndarray) -> np.ndarray:
        """Make room for T new slots and return their positions.    bool [..., T] -> int64 [..., T]

        Each row counts only its own tokens, so that padding shifts nothing. Raises ValueError past the context length, when the
        rows are not those the cache was made for, and for a token in a row that only() left out.
        """
        *batch, T = is_token.shape
        if tuple(batch) != self.batch_shape:
            raise ValueError(f"tokens have batch shape {tuple(batch)}, but the cache was made for {self.batch_shape}")
        if self._active is not None and (is_token.any(axis=-1) & ~self._active).any():
            raise ValueError("found a token in a row that is not active, expected padding there")
        if (self._ends > self._lengths).any():  # a pass was interrupted
            self.truncate(self._lengths)
        counts = self._n_tokens[..., None] + np.cumsum(is_token, axis=-1)  # [..., T], from 1
        longest = int(np.max(counts, initial=0))
        if longest > self.max_seq_len:
            raise ValueError(f"{longest} tokens do not fit the model's context of {self.max_seq_len}")
        positions = np.where(is_token, counts - 1, PADDING)
        self._counts = self._n_tokens + np.count_nonzero(is_token, axis=-1)
        self._place(T)
        self._memory.positions = _grown(self._memory.positions, self._memory.size(self._end), -1, PADDING)
        self._rows(self._memory.positions)[self._new] = positions[self._written]
        return positions

    def update(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a layer's new keys and values, return all of them.    k, v [..., T, G, K] -> [..., G, S, K], views"""
        return self._write(self._memory.keys, layer, k), self._write(self._memory.values, layer, v)

    def commit(self) -> None:
        """Keep what the pass under way has written."""
        self._lengths[...], self._n_tokens[...] = self._ends, self._counts
        self._settle()

    def _alike(self) -> KVCache:
        """Return another cache with the same memory and rows."""
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        return other

    def _settle(self) -> None:
        """End the pass under way: update() then writes nothing, and reads up to the longest row's end."""
        self._end = self.length
        self._new: tuple = (*[slice(None)] * self._lengths.ndim, slice(0, 0))
        self._written: Any = ...  # the rows whose new slots those are, as an index

    def _place(self, T: int) -> None:
        """Decide in which slots a pass writes."""
        start, active = self.length, self._active
        if active is None and (self._lengths == start).all():
            self._new, self._written = (*[slice(None)] * self._lengths.ndim, slice(start, start + T)), ...
            self._ends[...] = start + T
        else:  # each active row from its own end: rows [N, 1] and slots [N, T] are indexed together
            self._written = rows = np.nonzero(np.ones(self.batch_shape, bool) if active is None else active)
            self._new = (*(i[:, None] for i in rows), self._lengths[rows][:, None] + np.arange(T))
            self._ends[rows] += T
        self._end = int(self._ends.max())

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """Return the part of an array of the memory that is this view's.    [all rows, ...] -> [..., ...], a view"""
        for rows in self._at:
            array = array[rows, ...]
        return array

    def _write(self, store: list[np.ndarray | None], layer: int, new: np.ndarray) -> np.ndarray:
        old = store[layer]
        if old is None:
            old = np.zeros((*self._memory.batch_shape, new.shape[-2], 0, new.shape[-1]), new.dtype)
        store[layer] = array = _grown(old, self._memory.size(self._end), -2, 0)
        array = self._rows(array)  # [..., G, slots, K]: a head's keys lie together
        array.swapaxes(-2, -3)[self._new] = new[self._written]
        return array[..., : self._end, :]

    def _forget(self, row: tuple[int, ...], start: int, stop: int) -> None:
        """Clear some slots at a row's end: other rows' passes read them, and NaN times the weight 0 would be NaN."""
        positions = self._rows(self._memory.positions)[row]
        positions[start:stop] = PADDING
        self._n_tokens[row] = np.count_nonzero(positions[:start] != PADDING)
        if self._memory.batch_shape:
            for array in (*self._memory.keys, *self._memory.values):
                if array is not None:
                    self._rows(array)[row][..., start:stop, :] = 0


class _Memory:
    """The arrays that a cache shares with the views of its rows: positions [rows, slots], and per layer [rows, G, slots, K]."""

    def __init__(self, n_layers: int, batch_shape: tuple[int, ...], capacity: int):
        self.batch_shape, self._capacity = batch_shape, capacity
        self.positions = np.empty((*batch_shape, 0), np.int64)
        self.keys: list[np.ndarray | None] = [None] * n_layers
        self.values: list[np.ndarray | None] = [None] * n_layers

    def size(self, needed: int) -> int:
        """Return how many slots to allocate for `needed` ones."""
        return max(needed, self._capacity)


def _grown(array: np.ndarray, needed: int, axis: int, fill: int) -> np.ndarray:
    """Return the array itself if `needed` fits along the axis, else a copy at least twice as long, filled at the end."""
    size = array.shape[axis]
    if needed <= size:
        return array
    shape = list(array.shape)
    shape[axis] = max(needed, 2 * size)
    # Zeros are memory that isn't touched before it is used.
    grown = np.zeros(shape, array.dtype) if fill == 0 else np.full(shape, fill, array.dtype)
    grown[(Ellipsis, slice(size)) + (slice(None),) * (-axis - 1)] = array
    return grown
