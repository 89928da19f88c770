"""The mathematics of Llama as pure functions of arrays.

Shapes are in the dimension key of model.py. Every result has the dtype of its input: a scalar from Python or an array made with
the input's dtype never promotes, while `np.sqrt(64)` or `np.zeros(n)` would turn a float32 model into float64. A function may
update in place an array it has made itself (`y += 1`): new memory costs more than the arithmetic. No input is changed.

The signatures are frozen: other implementations are checked by them. Faster forms are in engine/fast.py.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from .config import LinearRopeScaling, RopeScaling
from .engine.linear import products
from .engine.weights import native


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Scale x to unit root-mean-square, then by a learned weight.

    y = x / sqrt(mean(x²) + eps) · weight        x [..., D], weight [D] -> [..., D]
    Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    mean_square = (x[..., None, :] @ x[..., :, None])[..., 0] / x.shape[-1]  # x·x / D, as a product: no array of squares
    y = x / np.sqrt(mean_square + eps)
    y *= weight
    return y


def softmax(x: np.ndarray) -> np.ndarray:
    """Turn scores into weights, none negative, that sum to one along the last axis.

    y = exp(x - max(x)) / sum(exp(x - max(x)))        x [..., S] -> [..., S]; -inf gives exactly 0
    Subtracting the maximum changes nothing but keeps exp from overflowing.
    """
    y = x - np.max(x, axis=-1, keepdims=True)
    np.exp(y, out=y)
    y /= np.sum(y, axis=-1, keepdims=True)
    return y


def silu(x: np.ndarray) -> np.ndarray:
    """Multiply x by its sigmoid: the smooth gate of SwiGLU, also called swish.

    y = x · σ(x) = x / (1 + exp(-x))        any shape
    Elfwing et al. 2017, arXiv:1702.03118.
    """
    y = np.negative(x)
    with np.errstate(over="ignore"):  # exp(-x) = inf is right: the quotient is then -0
        np.exp(y, out=y)
    y += 1
    return np.divide(x, y, out=y)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Let one projection of the input gate the other.

    y = silu(gate) · up        gate, up [..., F] -> [..., F]
    Shazeer 2020, arXiv:2002.05202.
    """
    y = silu(gate)
    y *= up
    return y


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | LinearRopeScaling | None, dtype: DTypeLike
) -> np.ndarray:
    """Return the angle by which each pair of a head's numbers rotates per position, in radians.

    θ_j = theta^(-2j/K), then lowered by `scaling`        -> [K/2]
    Su et al. 2021, arXiv:2104.09864.

    RopeScaling is Llama 3.1's (apply_scaling in llama-models 0.3.0, llama3/model.py). It divides the frequencies of long waves
    by its factor f, and L, the original context, says which are long. LinearRopeScaling divides all frequencies by f.

        λ = 2π/θ_j,  s = (L/λ - low_freq_factor) / (high_freq_factor - low_freq_factor)
        θ_j where s > 1,  θ_j/f where s < 0,  else (1 - s)·θ_j/f + s·θ_j

    In float32 this follows torch's order of operations, every intermediate rounded to float32. The result equals torch's within
    one unit in the last place, whereas rounding the exact frequencies would differ more. float64 computes the exact formula.
    """
    exponents = np.arange(0, head_dim, 2, dtype=dtype) / head_dim  # [K/2]
    powers = theta ** exponents.astype(np.float64)  # as torch's float32 power rounds; NumPy's is less exact
    frequencies = 1 / powers.astype(dtype)
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    # 1 for wavelengths well inside the original context (kept as they are), 0 for those beyond it (stretched by the factor).
    smooth = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    return np.select([smooth < 0, smooth > 1], [frequencies / scaling.factor, frequencies], between)


def rope_rotation(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine and sine of every angle m·θ_j, shaped to broadcast over heads.

    positions [..., T], frequencies [K/2] -> cos, sin [..., T, 1, K/2]

    The angles are formed in the dtype of the frequencies. In float32, as in torch, angles of thousands of radians are off by up
    to about 1e-3: that is part of how the published models were trained and run, so the float32 model reproduces it.
    """
    angles = positions[..., None].astype(frequencies.dtype) * frequencies  # [..., T, K/2]
    angles = angles[..., None, :]
    return np.cos(angles), np.sin(angles)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate each adjacent pair of a head's numbers by its position's angles.

    y[2j] + i·y[2j+1] = (x[2j] + i·x[2j+1]) · e^(i·m·θ_j)        x [..., T, heads, K], cos, sin [..., T, 1, K/2] -> like x
    Su et al. 2021, arXiv:2104.09864. Hugging Face pairs x[j] with x[j + K/2] instead, and permutes wq and wk to match.
    """
    x, rotation = native(x), cos + 1j * sin
    return (np.ascontiguousarray(x).view(rotation.dtype) * rotation).view(x.dtype)


def causal_mask(query_positions: np.ndarray, slot_positions: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return 0 where a query may attend, -inf where the slot's position is after its own; broadcasts over heads.

    query_positions [..., T], slot_positions [..., S] -> [..., 1, T, S]
    """
    visible = slot_positions[..., None, :] <= query_positions[..., :, None]  # [..., T, S]
    zero, hidden = np.array([0, -math.inf], dtype)
    return np.where(visible, zero, hidden)[..., None, :, :]


def query_key_products(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the dot product of every query with every key of its group.

    q [..., T, H, K], keys [..., G, S, K] -> [..., H, T, S]
    Query head h uses key head h // (H/G): Ainslie et al. 2023, arXiv:2305.13245.
    """
    *batch, T, H, K = q.shape
    G, S = keys.shape[-3:-1]
    q = q.swapaxes(-2, -3).reshape(*batch, G, H // G * T, K)  # the queries that share a key head, below each other
    return products(q, keys).reshape(*batch, H, T, S)


def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Score how well each query matches each key, scaled and masked.

    scores = q·k / sqrt(K) + mask        q [..., T, H, K], keys [..., G, S, K], mask [..., 1, T, S] -> [..., H, T, S]
    Vaswani et al. 2017, arXiv:1706.03762.
    """
    scores = query_key_products(q, keys)
    scores /= math.sqrt(q.shape[-1])
    scores += mask
    return scores


def attention_heads(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Average the values that each query attends to, by its weights.

    heads = weights · v        weights [..., H, T, S], values [..., G, S, K] -> [..., T, H, K]
    """
    *batch, H, T, S = weights.shape
    G, K = values.shape[-3], values.shape[-1]
    heads = weights.reshape(*batch, G, H // G * T, S) @ values  # [..., G, R·T, K]
    return heads.reshape(*batch, H, T, K).swapaxes(-2, -3)
