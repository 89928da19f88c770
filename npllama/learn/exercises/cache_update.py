"""Exercise 10, cache_update: keep keys for the next token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np

from ...cache import KVCache
from ...config import Config
from .exercise import Exercise, floats, normal


def cases() -> list[tuple]:
    """Return the calls of one cache: a prompt of four tokens, three tokens one by one, then a chunk of two."""
    store = np.zeros((2, 12, 4), np.float32)
    calls, length = [], 0
    for seed, n_new in enumerate((4, 1, 1, 1, 2)):
        calls.append((store, length, normal(seed, n_new, 2, 4)))
        length += n_new
    return calls


def reference(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    """Append the new keys to `length` others with KVCache, and write them to `store` too, for the next call."""
    config = SimpleNamespace(max_seq_len=store.shape[1], n_layers=1)  # all that a cache reads of one
    cache = KVCache(cast(Config, config))
    for new in (store[:, :length].swapaxes(0, 1), k):
        cache.extend(np.ones(len(new), bool))
        keys, _ = cache.update(0, new, new)
        cache.commit()
    store[:, : keys.shape[1]] = keys
    return keys


def one_late(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    """Write one slot too late, in the first call as in all others."""
    end = length + 1 + len(k)
    store[:, length + 1 : end] = k.swapaxes(0, 1)
    return store[:, :end]


def small() -> list[tuple]:
    """Return two calls of a cache with one number per key; then a prompt of two tokens with two heads."""
    store, heads = np.zeros((1, 3, 1), np.float32), np.zeros((2, 2, 1), np.float32)
    return [(store, 0, floats([[1]])), (store, 1, floats([[2]])), (heads, 0, floats([[1], [2]], [[3], [4]]))]


EXERCISE = Exercise(
    name="cache_update",
    arguments="store, length, k",
    statement="""\
Store a layer's new keys, and return the keys of all tokens so far.

    slots length, length + 1, ..., length + T - 1 of the store take the new keys; slots 0 to length + T - 1 are returned

    store [G, C, K], the first `length` of its C slots in use; k [T, G, K] -> [G, length + T, K]

It is called for the prompt, then for each new token, with the same store. Values are kept in the same way.""",
    real="cache.KVCache.update",
    reference=reference,
    cases=cases,
    mistakes=(
        "cache_overwritten",
        "cache_over_the_last",
        "cache_empty_slot",
        "cache_whole",
        "cache_new_alone",
        "cache_not_kept",
        "cache_reshaped",
    ),
    variants={"slots count from 0: the first free one is slot `length`, not `length` + 1": one_late},
    small=small,
    in_place=True,
)
