"""Unpack the blocks of quantised GGUF tensors into integers, scales and units, exactly as ggml-quants.c does.

Each function takes the bytes of some rows, [n, blocks, bytes of a block], and returns q [n, in] with scale and unit as
Grouped.of() takes them. Numbers of 2 and 3 bits are stored in 4, those of 5 and 6 bits in 8.
Source: ggml, src/ggml-common.h (block_q4_0 and so on).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllama.engine.grouped import Grouped, Grouping

Parts = tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]  # q [n, blocks, group ...], scales and units [n, blocks, ...]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at an offset of every block.    -> [n, blocks, 1]"""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")


def _crumbs(x: np.ndarray, bits: int) -> np.ndarray:
    """Unpack bytes into integers of so many bits, lowest bits first.    [..., b] -> [..., 8 / bits, b]"""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return x[..., None, :] >> shifts & np.uint8((1 << bits) - 1)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """Unpack 16 bytes into 32 integers of 4 bits, lower halves first.    [n, blocks, 16] -> [n, blocks, 32]"""
    return _crumbs(x, 4).reshape(*x.shape[:2], -1)


def _high_bits(x: np.ndarray) -> np.ndarray:
    """Unpack 4 bytes into 32 bits.    [n, blocks, 4] -> [n, blocks, 32]"""
    return np.unpackbits(x, axis=-1, bitorder="little")


def _signed(q: np.ndarray, zero: int) -> np.ndarray:
    return q.astype(np.int8) - np.int8(zero)


def _q8_0(b: np.ndarray) -> Parts:
    return b[..., 2:].view(np.int8), [_half(b, 0)], []


def _q4_0(b: np.ndarray) -> Parts:
    return _nibbles(b[..., 2:]), [_half(b, 0)], []


def _q4_1(b: np.ndarray) -> Parts:
    return _nibbles(b[..., 4:]), [_half(b, 0), _half(b, 2)], []


def _q5_0(b: np.ndarray) -> Parts:
    return _signed(_nibbles(b[..., 6:]) | _high_bits(b[..., 2:6]) << 4, 16), [_half(b, 0)], []


def _q5_1(b: np.ndarray) -> Parts:
    return _signed(_nibbles(b[..., 8:]) | _high_bits(b[..., 4:8]) << 4, 0), [_half(b, 0), _half(b, 2)], []


def _of_32(x: np.ndarray, bits: int) -> np.ndarray:
    """Unpack K-quants: of each 32 bytes the lowest bits first, then the next.    [n, blocks, b] -> [n, blocks, 8b / bits]"""
    return _crumbs(x.reshape(*x.shape[:2], -1, 32), bits).reshape(*x.shape[:2], -1)


def _q2_k(b: np.ndarray) -> Parts:
    scales = b[..., :16]
    return _of_32(b[..., 16:80], 2), [scales & 15, scales >> 4], [_half(b, 80), -_half(b, 82)]


def _q3_k(b: np.ndarray) -> Parts:
    q = _of_32(b[..., 32:96], 2) | _of_32(b[..., :32], 1) << 2
    low, high = _crumbs(b[..., 96:104], 4), _crumbs(b[..., 104:108], 2)  # of 16 scales: 4 bits each, and 2
    scales = low.reshape(*b.shape[:2], 16) | high.reshape(*b.shape[:2], 16) << 4
    return q, [_signed(scales, 32)], [_half(b, 108)]


def _six_bits(x: np.ndarray) -> list[np.ndarray]:
    """Unpack 12 bytes into 8 scales and 8 offsets of 6 bits: four of each are whole, the others' upper bits above them."""
    d, m, md = x[..., :4], x[..., 4:8], x[..., 8:]
    scales = np.concatenate([d & 63, md & 15 | d >> 2 & 48], axis=-1)
    return [scales, np.concatenate([m & 63, md >> 4 | m >> 2 & 48], axis=-1)]


def _q4_k(b: np.ndarray) -> Parts:
    return _of_32(b[..., 16:], 4), _six_bits(b[..., 4:16]), [_half(b, 0), -_half(b, 2)]


def _q5_k(b: np.ndarray) -> Parts:
    q = _of_32(b[..., 48:], 4) | _of_32(b[..., 16:48], 1) << 4
    return _signed(q, 0), _six_bits(b[..., 4:16]), [_half(b, 0), -_half(b, 2)]


def _q6_k(b: np.ndarray) -> Parts:
    n, blocks, _ = b.shape
    low = _crumbs(b[..., :128].reshape(n, blocks, 2, 64), 4).reshape(n, blocks, -1)  # 64 bytes at a time
    q = low | _of_32(b[..., 128:192], 2) << 4
    return _signed(q, 32), [b[..., 192:208].view(np.int8)], [_half(b, 208)]


BLOCKS: dict[str, tuple[Grouping, Callable[[np.ndarray], Parts]]] = {
    "Q8_0": (Grouping(8, 32, "float16"), _q8_0),
    "Q4_0": (Grouping(4, 32, "float16", zero=8), _q4_0),
    "Q4_1": (Grouping(4, 32, "float16", offset=True), _q4_1),
    "Q5_0": (Grouping(8, 32, "float16"), _q5_0),
    "Q5_1": (Grouping(8, 32, "float16", offset=True), _q5_1),
    "Q2_K": (Grouping(4, 16, "uint8", offset=True, unit=16), _q2_k),
    "Q3_K": (Grouping(4, 16, "int8", zero=4, unit=16), _q3_k),
    "Q4_K": (Grouping(4, 32, "uint8", offset=True, unit=8), _q4_k),
    "Q5_K": (Grouping(8, 32, "uint8", offset=True, unit=8), _q5_k),
    "Q6_K": (Grouping(8, 16, "int8", unit=16), _q6_k),
}


def grouped(kind: str, raw: np.ndarray, block_bytes: int) -> Grouped:
    """Return some rows of a tensor of one of the kinds in BLOCKS, still quantised.    raw uint8 [n, bytes of a row]"""
    grouping, take_apart = BLOCKS[kind]
    q, scales, units = take_apart(np.ascontiguousarray(raw).reshape(len(raw), -1, block_bytes))
    unit = np.stack(units).reshape(len(units), len(raw), -1) if units else None
    return Grouped.of(grouping, q.reshape(len(raw), -1), np.stack(scales).reshape(len(scales), len(raw), -1), unit)
