"""The keys and values of every token so far, so that each is computed once."""

from __future__ import annotations

import numpy as np

from .config import Config

PADDING = 1 << 30  # the position of a padding slot: after every real one, so no query reaches it


class KVCache:
    """Keys and values per layer, and the position that each slot holds.

    positions  int64 [..., S]       PADDING where the token was padding
    keys       [..., G, S, K] per layer, after RoPE
    values     [..., G, S, K] per layer

    One forward pass calls extend() once, update() once a layer, and commit() at its end: a pass that is interrupted leaves the
    cache as it was. Memory grows by doubling.
    """

    def __init__(self, config: Config, batch_shape: tuple[int, ...] = ()):
        self.max_seq_len = config.max_seq_len
        self.length = 0  # slots committed
        self.end = 0  # slots including those of the pass under way
        self.batch_shape = batch_shape
        self._positions = np.empty((*batch_shape, 0), np.int64)
        self._keys: list[np.ndarray | None] = [None] * config.n_layers
        self._values: list[np.ndarray | None] = [None] * config.n_layers

    @property
    def positions(self) -> np.ndarray:
        """The position of every slot, the new ones included.    [..., S]"""
        return self._positions[..., : self.end]

    @property
    def n_tokens(self) -> np.ndarray:
        """How many tokens each row holds, without padding.    int [...]"""
        return np.count_nonzero(self._positions[..., : self.length] != PADDING, axis=-1)

    def truncate(self, length: int) -> None:
        """Forget all slots from `length` on. Raises ValueError for a negative one."""
        if length < 0:
            raise ValueError(f"length is {length}, expected 0 or more")
        self.length = self.end = min(self.length, length)

    def extend(self, is_token: np.ndarray) -> np.ndarray:
        """Make room for T new slots and return their positions.    bool [..., T] -> int64 [..., T]

        Each row counts only its own tokens, so that padding shifts nothing. Raises ValueError past the context length or when
        the rows are not those the cache was made for.
        """
        *batch, T = is_token.shape
        if tuple(batch) != self.batch_shape:
            raise ValueError(f"tokens have batch shape {tuple(batch)}, but the cache was made for {self.batch_shape}")
        counts = self.n_tokens[..., None] + np.cumsum(is_token, axis=-1)  # [..., T], from 1
        longest = int(np.max(counts, initial=0))
        if longest > self.max_seq_len:
            raise ValueError(f"{longest} tokens do not fit the model's context of {self.max_seq_len}")
        self.end = self.length + T
        self._positions = _grown(self._positions, self.length, self.end, axis=-1)
        self._positions[..., self.length : self.end] = np.where(is_token, counts - 1, PADDING)
        return self._positions[..., self.length : self.end]

    def update(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a layer's new keys and values, return all of them.    k, v [..., T, G, K] -> [..., G, S, K], views"""
        return self._write(self._keys, layer, k), self._write(self._values, layer, v)

    def commit(self) -> None:
        """Keep what the pass under way has written."""
        self.length = self.end

    def _write(self, store: list[np.ndarray | None], layer: int, new: np.ndarray) -> np.ndarray:
        new = new.swapaxes(-2, -3)  # [..., G, T, K]: a head's keys lie together
        old = store[layer]
        if old is None:
            old = np.empty((*new.shape[:-2], 0, new.shape[-1]), new.dtype)
        store[layer] = grown = _grown(old, self.length, self.end, axis=-2)
        grown[..., self.length : self.end, :] = new
        return grown[..., : self.end, :]


def _grown(array: np.ndarray, used: int, needed: int, axis: int) -> np.ndarray:
    """The array itself if `needed` fits along the axis, else one at least twice as long with the first `used` copied."""
    if needed <= array.shape[axis]:
        return array
    shape = list(array.shape)
    shape[axis] = max(needed, 2 * shape[axis])
    grown = np.empty(shape, array.dtype)
    kept = (Ellipsis, slice(used)) + (slice(None),) * (-axis - 1)
    grown[kept] = array[kept]
    return grown
