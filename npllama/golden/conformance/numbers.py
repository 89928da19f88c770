"""Draw numbers that are the same bytes on every machine, without a library's random stream or a function that rounds.

The generator is splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195), whose n-th output depends on n and the seed
alone; the seed is the first eight bytes of a text's sha256, little-endian. A float is an odd integer times a power of two.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

STEP, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def words(text: str, n: int) -> np.ndarray:
    """Return n pseudo-random words.    uint64 [n]"""
    seed = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], "<u8").astype(np.uint64)
    z = seed + np.arange(1, n + 1, dtype=np.uint64) * STEP  # modulo 2^64, as in all of this function
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Floats:
    """Describe floats to draw: odd integers of `bits` bits and a sign, times a power of two, below 2^(exponent + 1).

    With 8 bits, each is exact in float32, float16 and bfloat16, so that no precision rounds the inputs.
    """

    shape: tuple[int, ...]
    exponent: int = 0
    bits: int = 8
    above: float = 0.0  # added, for another mean

    def draw(self, text: str) -> np.ndarray:
        """Return the floats of this seed.    float32 [...]"""
        n = int(np.prod(self.shape))
        whole = (words(text, n) >> np.uint64(64 - self.bits)).astype(np.int64) - (1 << (self.bits - 1))
        x = np.ldexp((2 * whole + 1).astype(np.float64), self.exponent + 1 - self.bits) + self.above
        return x.astype(np.float32).reshape(self.shape)


@dataclass(frozen=True)
class Integers:
    """Describe integers to draw, from `low` to `high` - 1."""

    shape: tuple[int, ...]
    low: int
    high: int
    dtype: str = "int64"

    def draw(self, text: str) -> np.ndarray:
        """Return the integers of this seed."""
        n = int(np.prod(self.shape))
        x = (words(text, n) % np.uint64(self.high - self.low)).astype(np.int64) + self.low
        return x.astype(self.dtype).reshape(self.shape)
