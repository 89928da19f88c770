"""Tiny models with random weights that differ in the properties that ports get wrong."""

from __future__ import annotations

import hashlib

import numpy as np

from npllama import Config, RopeScaling, parameter_shapes

LLAMA_3_1 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
LLAMA_3_2 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def config(**changes) -> Config:
    """Return a config of width 96; 6 query heads on 2 key/value heads, so that H/G = 3 is not G = 2; separate output matrix."""
    values = {
        "dim": 96,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 256,
        "vocab_size": 131,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_seq_len": 512,
        "tied_embeddings": False,
    }
    return Config(**{**values, **changes})


CONFIGS = {
    "llama1": config(n_kv_heads=6, norm_eps=1e-6),  # every head has its own keys and values
    "grouped": config(),
    "one_kv_head": config(n_kv_heads=1, tied_embeddings=True, rope_theta=500000.0),
    "odd_ffn": config(ffn_dim=11 * 23, n_layers=3, norm_eps=1e-6),  # multiple_of 23
    "wide_heads": config(head_dim=24, n_heads=4, n_kv_heads=2, tied_embeddings=True),
    "narrow_heads": config(head_dim=8, rope_theta=500000.0),  # head_dim is not dim / n_heads
    "llama3.1": config(rope_theta=500000.0, rope_scaling=LLAMA_3_1, max_seq_len=131072),
    "llama3.2": config(rope_theta=500000.0, rope_scaling=LLAMA_3_2, max_seq_len=131072, head_dim=32, tied_embeddings=True),
}


def uniform(seed: int, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
    """Return float32 numbers that are the same on every machine and in every NumPy.

    NumPy freezes RandomState's streams for good (NEP 19), which it does not for Generator's; integers times one number need no
    libm.
    """
    integers = np.random.RandomState(seed).randint(-(1 << 23), 1 << 23, size=shape)
    return (integers * (std * 3**0.5 / (1 << 23))).astype(np.float32)


def random_params(config: Config, seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return weights of standard deviation 0.1, so that a float32 pass at width 96 errs by well under 1e-5; norms near 1."""
    params = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        x = uniform(seed * 1000 + i, shape, std=0.1)
        params[name] = ((1 + x) if len(shape) == 1 else x).astype(dtype)
    return params


def random_tokens(config: Config, seed: int, shape: tuple[int, ...] | int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, config.vocab_size, size=shape)


def byte_swapped(x: np.ndarray) -> np.ndarray:
    """Return the same numbers in the other byte order than this machine's."""
    return x.astype(x.dtype.newbyteorder("S"))


def sha256_of(params: dict[str, np.ndarray]) -> str:
    """Return one hash over all parameters, to check that recorded goldens are of the same weights."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name]).tobytes())
    return digest.hexdigest()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference divided by the largest expected magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    assert np.isfinite(found).all()
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
