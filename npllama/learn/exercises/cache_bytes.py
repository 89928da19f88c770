"""Exercise 14, cache_bytes: the memory of a key/value cache."""

from __future__ import annotations

from .exercise import Exercise


def cases() -> list[tuple]:
    """Return Llama 3 8B and Llama 2 7B in 16 bits with their contexts full, and the embedded model in float32."""
    return [(32, 32, 8, 128, 8192, 2), (32, 32, 32, 128, 4096, 2), (6, 6, 2, 32, 512, 4)]


def reference(n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int, n_tokens: int, n_bytes: int) -> int:
    """Count the bytes of all keys and values."""
    return 2 * n_layers * n_kv_heads * head_dim * n_tokens * n_bytes


def small() -> list[tuple]:
    """Return a small model."""
    return [(2, 6, 2, 3, 5, 4)]


EXERCISE = Exercise(
    name="cache_bytes",
    arguments="n_layers, n_heads, n_kv_heads, head_dim, n_tokens, n_bytes",
    statement="""\
Count the bytes that the keys and values of n_tokens tokens take, at n_bytes for each number.

    each layer keeps a key and a value for each token and each key/value head, of head_dim numbers        -> a whole number

n_heads is the number of query heads; queries are not kept.""",
    real="cache.KVCache",
    reference=reference,
    cases=cases,
    variants={
        "there is a key and a value: twice as much": lambda *sizes: reference(*sizes) // 2,
        "a key and a value are kept for each key/value head, not for each query head": (
            lambda layers, heads, kv_heads, *others: reference(layers, heads, heads, *others)
        ),
        "these are bits: n_bytes counts bytes": lambda *sizes: reference(*sizes) * 8,
        "these are the bytes of one layer": lambda layers, *others: reference(1, *others),
        "these are numbers, not bytes: each takes n_bytes": lambda *sizes: reference(*sizes) // sizes[-1],
        "these are the bytes of one token": lambda *sizes: reference(*sizes) // sizes[4],
    },
    small=small,
)
