"""Ten functions to write oneself, from softmax to the KV cache, each with the mistakes that are usual there.

A mistake is kept as a wrong implementation: whoever makes it gets its numbers, and so is recognised by them (grading.py). The
references are the functions that the model itself runs. Shapes are in the dimension key of model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .. import ops
from ..cache import KVCache
from ..sampling import Sampling, probabilities


@dataclass(frozen=True)
class Mistake:
    """A wrong implementation, and what to tell whoever has its numbers."""

    hint: str
    function: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    name, arguments   what the student's file defines
    statement         a sentence, the formula, the shapes
    real              where npllama has it, `module.function`
    reference         what it must agree with: same arguments, right result
    cases             the arguments of each call; every call of `cases` makes the same arrays anew
    mistakes          wrong implementations whose numbers are recognised
    any_float         whether float64 is as good as float32
    in_place          whether it is meant to write into its arguments
    """

    name: str
    arguments: str
    statement: str
    real: str
    reference: Callable[..., np.ndarray]
    cases: Callable[[], list[tuple]]
    mistakes: Sequence[Mistake]
    any_float: bool = False
    in_place: bool = False

    @property
    def summary(self) -> str:
        """The statement's first line."""
        return self.statement.splitlines()[0]


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random float32 numbers, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------- cases


def softmax_cases() -> list[tuple]:
    """Ordinary scores, masked ones, and rows far apart, each large enough for exp to overflow or to vanish."""
    masked = normal(2, 4, 4) + np.triu(np.full((4, 4), -np.inf, np.float32), k=1)
    apart = normal(3, 3, 5) + np.array([[0], [1000], [-1000]], np.float32)
    return [(normal(1, 2, 3, 5),), (masked,), (apart,)]


def rms_norm_cases() -> list[tuple]:
    """Rows of very different size, so small that eps counts, and far from zero in the mean."""
    sizes = np.array([[1], [0.01], [100]], np.float32)
    return [(normal(1, 3, 8) * sizes, normal(2, 8), 1e-5), (normal(3, 2, 3, 8) * 0.03 + 0.02, normal(4, 8), 1e-3)]


def rotation_cases() -> list[tuple]:
    """Heads at positions 0, 1, 2, ... and at far ones; the rotations of a pair differ from pair to pair."""
    frequencies = ops.rope_frequencies(8, 10000.0, None, np.float32)
    positions = (np.arange(4), np.array([3, 70, 500]))
    return [(normal(1, len(m), 2, 8), *ops.rope_rotation(m, frequencies)) for m in positions]


def mask_cases() -> list[tuple]:
    """A prompt, one token after it, and a chunk of three after it; and a cache whose slots are not in order."""
    prompt, decode, chunk = (np.arange(5), np.arange(5)), (np.array([5]), np.arange(6)), (np.arange(5, 8), np.arange(8))
    return [prompt, decode, chunk, (np.array([1, 2]), np.array([2, 0, 1]))]


def scores_cases() -> list[tuple]:
    """Four query heads on two key heads; decode, with one query and no mask to speak of; a head for each; and masks that are no
    triangle: behind a slot of padding, and of finite numbers."""
    triangle = ops.causal_mask(np.arange(3), np.arange(3), np.float32)
    padded = ops.causal_mask(np.array([1, 2]), np.array([9, 0, 1, 2]), np.float32)
    finite = np.array([[[0, -np.inf, -np.inf], [-1.5, 0, -np.inf]]], np.float32)
    return [
        (normal(1, 3, 4, 8), normal(2, 2, 3, 8), triangle),
        (normal(3, 1, 6, 4), normal(4, 2, 5, 4), np.zeros((1, 1, 5), np.float32)),
        (normal(5, 3, 2, 4), normal(6, 2, 3, 4), triangle),
        (normal(7, 2, 2, 4), normal(8, 1, 4, 4), padded),
        (normal(9, 2, 2, 4), normal(10, 2, 3, 4), finite),
    ]


def heads_cases() -> list[tuple]:
    """As in scores_cases, with weights that sum to one."""
    return [
        (ops.softmax(normal(1, 4, 3, 3)), normal(2, 2, 3, 8)),
        (ops.softmax(normal(3, 6, 1, 5)), normal(4, 2, 5, 4)),
        (ops.softmax(normal(5, 2, 3, 3)), normal(6, 2, 3, 4)),
    ]


def swiglu_cases() -> list[tuple]:
    """Ordinary numbers, and gates so large that exp overflows."""
    return [(normal(1, 3, 8), normal(2, 3, 8)), (normal(3, 4) + np.array([1000, -1000, 1, 0], np.float32), normal(4, 4))]


def probabilities_cases() -> list[tuple]:
    """Logits in no order, at several temperatures; where one token alone has top_p; where nothing is cut; and an edge.

    At (2.0, 0.8) and (0.5, 0.75) top_p keeps other tokens than it would without the temperature, 4 and 2 instead of 3. The last
    case is 1/2, 1/4 and 1/4, to the bit, in float32 and in float64: the first token reaches 1/2 exactly.
    """
    logits = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32)) + 2
    halves = np.array([-1, 0, -1], np.float32)
    settings = [(1.0, 0.6), (0.7, 0.8), (2.0, 0.5), (2.0, 0.8), (0.5, 0.75), (1.0, 0.3)]
    return [*((logits, *pair) for pair in settings), (logits * 1000, 1.0, 1.0), (halves, 1 / math.log(2), 0.5)]


def cache_cases() -> list[tuple]:
    """One cache: a prompt of four tokens, three tokens one by one, then a chunk of two."""
    store = np.zeros((2, 12, 4), np.float32)
    calls, length = [], 0
    for seed, n_new in enumerate((4, 1, 1, 1, 2)):
        calls.append((store, length, normal(seed, n_new, 2, 4)))
        length += n_new
    return calls


# ----------------------------------------------------------------------------------------------- references that need fitting


def real_cache_update(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    """What KVCache returns for the new keys after `length` others; written to `store` too, for the next call."""
    cache = KVCache(SimpleNamespace(max_seq_len=store.shape[1], n_layers=1))
    for new in (store[:, :length].swapaxes(0, 1), k):
        cache.extend(np.ones(len(new), bool))
        keys, _ = cache.update(0, new, new)
        cache.commit()
    store[:, : keys.shape[1]] = keys
    return keys


# ------------------------------------------------------------------------------------------- parts that wrong answers share


def _normalised(y: np.ndarray, axis: int | None = -1) -> np.ndarray:
    return y / np.sum(y, axis=axis, keepdims=True)


def _mean_square(x: np.ndarray, axis: int | None = -1) -> np.ndarray:
    return np.mean(x * x, axis=axis, keepdims=True)


def _turned(first: np.ndarray, second: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return first * cos - second * sin, first * sin + second * cos


def _paired(even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    return np.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)


def _pairs_turned_one_after_the_other(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    even = x[..., 0::2] * cos - x[..., 1::2] * sin
    return _paired(even, even * sin + x[..., 1::2] * cos)


def _mask_of(visible: np.ndarray, hidden: float = -np.inf) -> np.ndarray:
    return np.where(visible, np.float32(0), np.float32(hidden))[None]


def _repeated(keys: np.ndarray, n_heads: int) -> np.ndarray:
    return np.repeat(keys, n_heads // len(keys), axis=0)


def _tiled(keys: np.ndarray, n_heads: int) -> np.ndarray:
    return np.tile(keys, (n_heads // len(keys), 1, 1))


def _triangle(n_queries: int, n_slots: int) -> np.ndarray:
    return _mask_of(np.tri(n_queries, n_slots, n_slots - n_queries, dtype=bool))


def _products(q: np.ndarray, keys: np.ndarray, spread: Callable[[np.ndarray, int], np.ndarray] = _repeated) -> np.ndarray:
    return q.swapaxes(0, 1) @ spread(keys, q.shape[1]).swapaxes(1, 2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _chosen(p: np.ndarray, top_p: float, cut: Callable[[np.ndarray, float], np.ndarray]) -> np.ndarray:
    """`p` with those at zero that `cut` names, of the probabilities in order from the most likely, and normalised again."""
    order = np.argsort(-p, kind="stable")
    kept = p.copy()
    kept[order[cut(p[order], top_p)]] = 0
    return _normalised(kept)


def _beyond(p: np.ndarray, top_p: float) -> np.ndarray:
    """Where more likely ones reach top_p already: the right cut."""
    return np.cumsum(p) - p >= top_p


def _beyond_by_more(p: np.ndarray, top_p: float) -> np.ndarray:
    return np.cumsum(p) - p > top_p


def _at_or_beyond(p: np.ndarray, top_p: float) -> np.ndarray:
    return np.cumsum(p) > top_p


def _at_or_beyond_but_one(p: np.ndarray, top_p: float) -> np.ndarray:
    return _at_or_beyond(p, top_p) & (np.arange(len(p)) > 0)


def _cut_before_the_temperature(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    kept = _chosen(ops.softmax(logits), top_p, _beyond) > 0
    return _normalised(ops.softmax(logits / temperature) * kept)


def _written(store: np.ndarray, at: int, k: np.ndarray) -> None:
    """The part of `k` that fits, to the slots from `at` on."""
    room = store[:, at : at + len(k)]
    room[:] = k.swapaxes(0, 1)[:, : room.shape[1]]


def _cache_overwritten(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    _written(store, 0, k)
    return store[:, : length + len(k)]


def _cache_with_an_empty_slot(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    at = length + 1 if length else 0
    _written(store, at, k)
    return store[:, : at + len(k)]


def _cache_over_the_last(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    _written(store, max(0, length - 1), k)
    return store[:, : length + len(k)]


def _cache_whole(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    _written(store, length, k)
    return store


def _cache_reshaped(store: np.ndarray, length: int, k: np.ndarray) -> np.ndarray:
    store[:, length : length + len(k)] = k.reshape(store.shape[0], len(k), -1)
    return store[:, : length + len(k)]


# ------------------------------------------------------------------------------------------------------------------ exercises

EXERCISES = (
    Exercise(
        name="softmax",
        arguments="x",
        statement="""\
Turn scores into weights, none negative, that sum to one along the last axis.

    y = exp(x) / sum(exp(x))        x [..., S] -> [..., S]

A score may be 1000, and may be -inf, which gives exactly 0.""",
        real="ops.softmax",
        reference=ops.softmax,
        cases=softmax_cases,
        mistakes=(
            Mistake(
                "exp overflows at large scores, and inf / inf is NaN: subtract each row's maximum first",
                lambda x: _normalised(np.exp(x)),
            ),
            Mistake(
                "the maximum is that of the whole array: where a row lies far below it, all its exp are 0; take each row's own",
                lambda x: _normalised(np.exp(x - np.max(x))),
            ),
            Mistake(
                "the sum goes over the whole array: each row is a distribution of its own, axis=-1 with keepdims=True",
                lambda x: _normalised(np.exp(x - np.max(x, axis=-1, keepdims=True)), axis=None),
            ),
            Mistake(
                "the sum goes along the first axis: the scores of one query lie along the last, axis=-1",
                lambda x: _normalised(np.exp(x - np.max(x, axis=0, keepdims=True)), axis=0),
            ),
            Mistake(
                "the weights don't sum to one: divide by the sum of the exp along the last axis",
                lambda x: np.exp(x - np.max(x, axis=-1, keepdims=True)),
            ),
        ),
    ),
    Exercise(
        name="rms_norm",
        arguments="x, weight, eps",
        statement="""\
Scale x to unit root-mean-square, then by a learned weight.

    y = x / sqrt(mean(x²) + eps) · weight        x [..., D], weight [D] -> [..., D]

Each token, a row of D numbers, is scaled by itself.""",
        real="ops.rms_norm",
        reference=ops.rms_norm,
        cases=rms_norm_cases,
        mistakes=(
            Mistake(
                "the mean is subtracted: that is LayerNorm; RMSNorm only divides",
                lambda x, weight, eps: ops.rms_norm(x - np.mean(x, axis=-1, keepdims=True), weight, eps),
            ),
            Mistake(
                "eps is added after the square root: it belongs inside, sqrt(mean(x²) + eps)",
                lambda x, weight, eps: x / (np.sqrt(_mean_square(x)) + eps) * weight,
            ),
            Mistake(
                "eps is missing: small rows come out too large, and a row of zeros as NaN",
                lambda x, weight, eps: x / np.sqrt(_mean_square(x)) * weight,
            ),
            Mistake(
                "np.var and np.std subtract the mean before they square: RMSNorm has the mean of x² itself",
                lambda x, weight, eps: x / np.sqrt(np.var(x, axis=-1, keepdims=True) + eps) * weight,
            ),
            Mistake(
                "the squares are summed, not averaged: RMS is the root of their mean",
                lambda x, weight, eps: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps) * weight,
            ),
            Mistake(
                "the mean goes over all tokens: each has its own, axis=-1 with keepdims=True",
                lambda x, weight, eps: x / np.sqrt(_mean_square(x, axis=None) + eps) * weight,
            ),
            Mistake(
                "the square root is missing: divide by sqrt(mean(x²) + eps)",
                lambda x, weight, eps: x / (_mean_square(x) + eps) * weight,
            ),
            Mistake(
                "the learned weight is missing: multiply by it at the end",
                lambda x, weight, eps: ops.rms_norm(x, np.ones_like(weight), eps),
            ),
            Mistake(
                "the weight is taken as 1 + weight: Gemma stores it so, Llama stores the factor itself",
                lambda x, weight, eps: ops.rms_norm(x, 1 + weight, eps),
            ),
        ),
    ),
    Exercise(
        name="rope_frequencies",
        arguments="head_dim, theta",
        statement="""\
How far each pair of a head's numbers turns per position, in radians.

    θ_j = theta^(-2j/K)        j = 0, 1, ..., K/2 - 1, K = head_dim -> float32 [K/2]

The first pair turns by 1 radian per position, each further one more slowly.""",
        real="ops.rope_frequencies",
        reference=lambda head_dim, theta: ops.rope_frequencies(head_dim, theta, None, np.float32),
        cases=lambda: [(8, 10000.0), (64, 500000.0)],
        mistakes=(
            Mistake(
                "the exponent is j/K: it is 2j/K, np.arange(0, head_dim, 2) / head_dim",
                lambda head_dim, theta: theta ** -(np.arange(head_dim // 2, dtype=np.float32) / head_dim),
            ),
            Mistake(
                "the exponent has the wrong sign: the frequencies fall from 1, so it is theta^(-2j/K)",
                lambda head_dim, theta: theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim),
            ),
            Mistake(
                "2j is divided by K/2: the number of pairs; the formula has K, all of head_dim",
                lambda head_dim, theta: theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim // 2)),
            ),
            Mistake(
                "there is a frequency for each number: a pair shares one, so there are K/2",
                lambda head_dim, theta: theta ** -(np.arange(head_dim, dtype=np.float32) / head_dim),
            ),
            Mistake(
                "each frequency is there twice, as Hugging Face's code needs it: here a pair has one, so there are K/2",
                lambda head_dim, theta: np.tile(theta ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim), 2),
            ),
            Mistake(
                "theta is 10000 whatever the argument says: LLaMA 1 and 2 have that, Llama 3 has 500000",
                lambda head_dim, theta: ops.rope_frequencies(head_dim, 10000.0, None, np.float32),
            ),
            Mistake(
                "theta is 500000 whatever the argument says: Llama 3 has that, LLaMA 1 and 2 have 10000",
                lambda head_dim, theta: ops.rope_frequencies(head_dim, 500000.0, None, np.float32),
            ),
        ),
    ),
    Exercise(
        name="rope",
        arguments="x, cos, sin",
        statement="""\
Rotate each adjacent pair of a head's numbers by its position's angles.

    y[2j]   = x[2j] · cos[j] - x[2j+1] · sin[j]
    y[2j+1] = x[2j] · sin[j] + x[2j+1] · cos[j]        x [T, heads, K], cos, sin [T, 1, K/2] -> [T, heads, K]

The pairs are those of Meta's checkpoints: (x[0], x[1]), (x[2], x[3]), ...""",
        real="ops.rope",
        reference=ops.rope,
        cases=rotation_cases,
        mistakes=(
            Mistake(
                "the halves of the head are turned, x[j] with x[j + K/2]: that is Hugging Face's layout, whose wq and wk are "
                "permuted to match; Meta's pairs are adjacent, x[2j] with x[2j+1]",
                lambda x, cos, sin: np.concatenate(_turned(*np.split(x, 2, axis=-1), cos, sin), axis=-1),
            ),
            Mistake(
                "the pairs are turned backwards: the minus belongs to the first of the pair",
                lambda x, cos, sin: ops.rope(x, cos, -sin),
            ),
            Mistake(
                "all first numbers come before all second ones: put each back where it was, y[..., 0::2] and y[..., 1::2]",
                lambda x, cos, sin: np.concatenate(_turned(x[..., 0::2], x[..., 1::2], cos, sin), axis=-1),
            ),
            Mistake(
                "the second number of a pair is made from the first one already turned: both need the old x",
                _pairs_turned_one_after_the_other,
            ),
            Mistake("cos and sin are exchanged", lambda x, cos, sin: ops.rope(x, sin, cos)),
        ),
    ),
    Exercise(
        name="causal_mask",
        arguments="query_positions, slot_positions",
        statement="""\
0 where a query may look, -inf where the slot's position is after its own.

    mask = 0 where slot_positions <= query_positions, else -inf

    query_positions int [T], slot_positions int [S] -> float32 [1, T, S]; the 1 stands for all heads

In decoding, T is 1 and S is all tokens so far. Slots need not be in order.""",
        real="ops.causal_mask",
        reference=lambda query_positions, slot_positions: ops.causal_mask(query_positions, slot_positions, np.float32),
        cases=mask_cases,
        mistakes=(
            Mistake(
                "off by one: a token doesn't see itself; the first then sees nothing, and its softmax is NaN",
                lambda q, s: _mask_of(s[None] < q[:, None]),
            ),
            Mistake(
                "off by one: a token sees the one after it, the very one that it should predict",
                lambda q, s: _mask_of(s[None] <= q[:, None] + 1),
            ),
            Mistake(
                "it is turned round: tokens see what comes after them, and not what came before",
                lambda q, s: _mask_of(s[None] >= q[:, None]),
            ),
            Mistake(
                "a triangle of indices is right for a prompt alone: with a cache, row 0 is a late token; compare positions",
                lambda q, s: _mask_of(np.tri(len(q), len(s), dtype=bool)),
            ),
            Mistake(
                "a triangle shifted by S - T is right only while the slots are in order, without padding: compare positions",
                lambda q, s: _triangle(len(q), len(s)),
            ),
            Mistake(
                "it is 1 and 0, to be multiplied: the mask is added to the scores, so it is 0 and -inf",
                lambda q, s: _mask_of(s[None] > q[:, None], hidden=1),
            ),
            Mistake(
                "hidden is a large negative number: only -inf gives exactly 0 after softmax, whatever the scores",
                lambda q, s: _mask_of(s[None] <= q[:, None], hidden=-1e9),
            ),
            Mistake(
                "hidden is the lowest finite number: a row that sees nothing would then look at what is hidden; use -inf",
                lambda q, s: _mask_of(s[None] <= q[:, None], hidden=np.finfo(np.float32).min),
            ),
            Mistake(
                "the sign is wrong: hidden is -inf, whose exp is 0; +inf makes the whole row NaN",
                lambda q, s: _mask_of(s[None] <= q[:, None], hidden=np.inf),
            ),
            Mistake(
                "0 times inf is NaN: choose with np.where instead of multiplying by -inf",
                lambda q, s: (s[None] > q[:, None])[None] * np.float32(-np.inf),
            ),
            Mistake(
                "what may be seen is hidden, and 0 times inf is NaN: np.where(slot <= query, 0, -inf)",
                lambda q, s: (s[None] <= q[:, None])[None] * np.float32(-np.inf),
            ),
            Mistake(
                "the axes are exchanged: rows are queries, columns are slots, [1, T, S]",
                lambda q, s: _mask_of(s[:, None] <= q[None]),
            ),
        ),
    ),
    Exercise(
        name="attention_scores",
        arguments="q, keys, mask",
        statement="""\
How well each query matches each key, scaled and masked.

    scores = q·k / sqrt(K) + mask        q [T, H, K], keys [G, S, K], mask [1, T, S] -> [H, T, S]

H is a multiple of G: the first H/G query heads share key head 0, the next H/G key head 1, and so on.""",
        real="ops.attention_scores",
        reference=ops.attention_scores,
        cases=scores_cases,
        mistakes=(
            Mistake(
                "scaled by K: it is the square root, q·k / sqrt(K)",
                lambda q, keys, mask: _products(q, keys) / q.shape[-1] + mask,
            ),
            Mistake(
                "not scaled: divide by sqrt(K), or softmax gives nearly all the weight to one key",
                lambda q, keys, mask: _products(q, keys) + mask,
            ),
            Mistake(
                "scaled by the root of the model's width: K is the width of one head, q.shape[-1]",
                lambda q, keys, mask: _products(q, keys) / math.sqrt(q.shape[-2] * q.shape[-1]) + mask,
            ),
            Mistake(
                "the key heads are tiled, 0 1 0 1: neighbours share one, 0 0 1 1, as np.repeat does it (np.tile does not)",
                lambda q, keys, mask: _products(q, keys, _tiled) / math.sqrt(q.shape[-1]) + mask,
            ),
            Mistake(
                "the mask is missing: every token sees those after it",
                lambda q, keys, mask: _products(q, keys) / math.sqrt(q.shape[-1]),
            ),
            Mistake(
                "the mask is scaled too: divide the products by sqrt(K) first, then add it as it is",
                lambda q, keys, mask: (_products(q, keys) + mask) / math.sqrt(q.shape[-1]),
            ),
            Mistake(
                "the mask is one of your own, a triangle: add the one that is given, which also hides padding",
                lambda q, keys, mask: _products(q, keys) / math.sqrt(q.shape[-1]) + _triangle(len(q), keys.shape[1]),
            ),
            Mistake(
                "rows are keys and columns queries: [H, T, S] has a row for each query",
                lambda q, keys, mask: _products(q, keys).swapaxes(1, 2) / math.sqrt(q.shape[-1]) + mask.swapaxes(1, 2),
            ),
        ),
    ),
    Exercise(
        name="attention_heads",
        arguments="weights, values",
        statement="""\
The values that each query attends to, averaged by its weights.

    heads = weights · v        weights [H, T, S], values [G, S, K] -> [T, H, K]

Heads share values as they share keys: the first H/G weights go with value head 0, and so on.""",
        real="ops.attention_heads",
        reference=ops.attention_heads,
        cases=heads_cases,
        mistakes=(
            Mistake(
                "the value heads are tiled, 0 1 0 1: neighbours share one, 0 0 1 1, as np.repeat does it (np.tile does not)",
                lambda weights, values: (weights @ _tiled(values, len(weights))).swapaxes(0, 1),
            ),
            Mistake(
                "heads come before tokens, [H, T, K]: swap the two axes, so that a token's heads lie together",
                lambda weights, values: weights @ _repeated(values, len(weights)),
            ),
            Mistake(
                "reshape keeps the order of the numbers, and so mixes heads and tokens: swap the axes instead",
                lambda weights, values: (weights @ _repeated(values, len(weights))).reshape(
                    weights.shape[1], len(weights), values.shape[-1]
                ),
            ),
        ),
    ),
    Exercise(
        name="swiglu",
        arguments="gate, up",
        statement="""\
Let one projection of the input gate the other.

    y = silu(gate) · up        silu(x) = x · σ(x) = x / (1 + exp(-x))        gate, up [..., F] -> [..., F]

A gate may be 1000 or -1000.""",
        real="ops.swiglu",
        reference=ops.swiglu,
        cases=swiglu_cases,
        mistakes=(
            Mistake(
                "silu is applied to up: it belongs to the gate, the product with w1",
                lambda gate, up: gate * ops.silu(up),
            ),
            Mistake(
                "the gate is σ(gate) alone: silu multiplies it by the gate itself",
                lambda gate, up: _sigmoid(gate) * up,
            ),
            Mistake("up is missing: the result is silu(gate) · up", lambda gate, up: ops.silu(gate)),
            Mistake(
                "the gate is GELU's: Llama has silu, x · σ(x)",
                lambda gate, up: gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up,
            ),
            Mistake("the gate is ReLU's: Llama has silu, x · σ(x)", lambda gate, up: np.maximum(gate, 0) * up),
            Mistake(
                "exp(x) / (1 + exp(x)) overflows at a large gate, and inf / inf is NaN: 1 / (1 + exp(-x)) does not",
                lambda gate, up: gate * (np.exp(gate) / (1 + np.exp(gate))) * up,
            ),
            Mistake(
                "the exponent has the wrong sign: silu(x) = x / (1 + exp(-x))",
                lambda gate, up: gate / (1 + np.exp(gate)) * up,
            ),
        ),
    ),
    Exercise(
        name="probabilities",
        arguments="logits, temperature, top_p",
        statement="""\
The distribution that the next token is drawn from.

    p = softmax(logits / temperature); of the most likely tokens keep the fewest that together reach top_p;
    the others get 0, and the rest sums to 1 again        logits [V] -> [V]

At least one token is always kept, and top_p = 1 keeps all. The result may be float32 or float64.""",
        real="sampling.probabilities",
        reference=lambda logits, temperature, top_p: probabilities(logits, Sampling(temperature, top_p=top_p)),
        cases=probabilities_cases,
        any_float=True,
        mistakes=(
            Mistake(
                "top-p cuts too early: the token whose probability crosses top_p is kept, only those after it go",
                lambda logits, temperature, top_p: _chosen(ops.softmax(logits / temperature), top_p, _at_or_beyond),
            ),
            Mistake(
                "top-p cuts too early: not only the first, but whichever token's probability crosses top_p is kept",
                lambda logits, temperature, top_p: _chosen(ops.softmax(logits / temperature), top_p, _at_or_beyond_but_one),
            ),
            Mistake(
                "top-p keeps one token too many where the others reach it exactly: once the sum is top_p, it is reached (>=)",
                lambda logits, temperature, top_p: _chosen(ops.softmax(logits / temperature), top_p, _beyond_by_more),
            ),
            Mistake(
                "top-p is applied before the temperature: divide by it first, and choose from the probabilities that result",
                _cut_before_the_temperature,
            ),
            Mistake(
                "top-p adds up the probabilities in the order of the ids: sort them first, the most likely in front",
                lambda logits, temperature, top_p: _normalised(
                    np.where(_beyond(p := ops.softmax(logits / temperature), top_p), np.float32(0), p)
                ),
            ),
            Mistake(
                "the temperature multiplies: divide the logits by it, so that a high one makes the tokens more alike",
                lambda logits, temperature, top_p: _chosen(ops.softmax(logits * temperature), top_p, _beyond),
            ),
            Mistake(
                "the temperature has no effect (dividing probabilities by it is undone by normalising): divide the logits "
                "by it",
                lambda logits, temperature, top_p: _chosen(ops.softmax(logits), top_p, _beyond),
            ),
            Mistake(
                "what is left doesn't sum to one: divide by its sum after the cut",
                lambda logits, temperature, top_p: (
                    _chosen(p := ops.softmax(logits / temperature), top_p, _beyond).astype(bool) * p
                ),
            ),
            Mistake(
                "nothing is cut: of the most likely tokens keep the fewest that together reach top_p",
                lambda logits, temperature, top_p: ops.softmax(logits / temperature),
            ),
            Mistake(
                "exp overflows at large logits: subtract their maximum first, as in softmax",
                lambda logits, temperature, top_p: _chosen(_normalised(np.exp(logits / temperature)), top_p, _beyond),
            ),
        ),
    ),
    Exercise(
        name="cache_update",
        arguments="store, length, k",
        statement="""\
Take a layer's new keys, and return those of every token so far.

    slots length, length + 1, ..., length + T - 1 of the store take the new keys; slots 0 to length + T - 1 are returned

    store [G, C, K], the first `length` of its C slots in use; k [T, G, K] -> [G, length + T, K]

It is called for the prompt, then for each new token, with the same store. Values are kept in the same way.""",
        real="cache.KVCache.update",
        reference=real_cache_update,
        cases=cache_cases,
        in_place=True,
        mistakes=(
            Mistake(
                "the new keys overwrite the first ones: they go behind the `length` slots in use",
                _cache_overwritten,
            ),
            Mistake(
                "there is an empty slot after the prompt: slots count from 0, so the first free one is slot `length`",
                _cache_with_an_empty_slot,
            ),
            Mistake(
                "the new key overwrites the last one: slots count from 0, so the first free one is slot `length`",
                _cache_over_the_last,
            ),
            Mistake(
                "the whole store is returned: its unused slots are keys of no token, and would be attended to",
                _cache_whole,
            ),
            Mistake(
                "only the new keys are returned: a query attends to those of every token so far",
                lambda store, length, k: k.swapaxes(0, 1),
            ),
            Mistake(
                "nothing stays in the store: the next call finds zeros where these keys should be",
                lambda store, length, k: np.concatenate([store[:, :length], k.swapaxes(0, 1)], axis=1),
            ),
            Mistake(
                "reshape keeps the order of the numbers, and so mixes tokens and heads: swap the axes, [T, G, K] to [G, T, K]",
                _cache_reshaped,
            ),
        ),
    ),
)


def find(name: str) -> Exercise:
    """The exercise of this name; ValueError where there is none."""
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    raise ValueError(f"there is no exercise {name!r}: expected one of {', '.join(exercise.name for exercise in EXERCISES)}")
