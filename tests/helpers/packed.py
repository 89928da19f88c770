"""Pack matrices as GPTQ's and AWQ's libraries do, in plain loops, independently of the readers under test.

Source: auto_gptq 0.7.1, QuantLinear.pack() of nn_modules/qlinear/qlinear_cuda.py; gptqmodel, utils/model.py,
convert_gptq_v2_to_v1_format_module(); autoawq 0.2.7, WQLinear_GEMM.from_linear() of modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Parts = dict[str, np.ndarray]


def _words(numbers: np.ndarray, bits: int, order: Sequence[int]) -> np.ndarray:
    """Pack neighbours along the last axis into 32-bit words: number order[i] of each word goes to bit i · bits."""
    per_word = 32 // bits
    packed = np.zeros((len(numbers), -(-numbers.shape[1] // per_word)), np.uint32)
    for column in range(packed.shape[1]):
        for i, place in enumerate(order):
            if (at := column * per_word + place) < numbers.shape[1]:
                packed[:, column] |= numbers[:, at].astype(np.uint32) << np.uint32(bits * i)
    return packed


def gptq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray, bits: int, less: str = "one") -> Parts:
    """Pack a matrix as GPTQ does.    q [out, in], zeros and scales [out, groups]

    less    how zero points are stored: "one" less each (v1), "one of words" (v1 by gptqmodel), or "none" (v2)
    """
    order = range(32 // bits)
    stored = _words(zeros.T - (less == "one"), bits, order)
    if less == "one of words":
        stored = stored - np.uint32(sum(1 << bits * i for i in order))
    parts = {"qweight": _words(q, bits, order).T, "qzeros": stored, "scales": scales.T, "g_idx": groups.astype(np.int32)}
    return {name: x.view(np.int32) if x.dtype == np.uint32 else x for name, x in parts.items()}


def awq(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> Parts:
    """Pack a 4-bit matrix as AWQ does.    q [out, in], zeros and scales [out, groups]"""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": _words(q.T, 4, order), "qzeros": _words(zeros.T, 4, order), "scales": scales.T}
    return {name: x.view(np.int32) if x.dtype == np.uint32 else x for name, x in parts.items()}


def numbers(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Dequantise, as all these formats do: scale · (q − zero), in float32, exact for 16-bit scales."""
    return (scales.astype(np.float64)[:, groups] * (q.astype(int) - zeros.astype(int)[:, groups])).astype(np.float32)
