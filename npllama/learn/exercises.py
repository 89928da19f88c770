"""Ten functions to write oneself, from softmax to the KV cache, each with the mistakes that are usual there.

Whoever makes a mistake of mistakes.py gets the numbers of its wrong function, and is recognised by them (grading.py). The
references are the functions that the model itself runs. Shapes are in the dimension key of model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from .. import ops
from ..cache import KVCache
from ..golden.mistakes import MISTAKES
from ..sampling import Sampling, probabilities


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    name, arguments   what the student's file defines
    statement         a sentence, the formula, the shapes
    real              where npllama has it, `module.function`
    reference         what it must agree with: the same arguments and `rest`, right result
    cases             the arguments of each call; every call of `cases` returns new arrays of the same numbers
    rest              further arguments of the reference, which the student's function doesn't take
    any_float         whether float64 is as good as float32
    in_place          whether it is meant to write into its arguments
    """

    name: str
    arguments: str
    statement: str
    real: str
    reference: Callable[..., np.ndarray]
    cases: Callable[[], list[tuple]]
    rest: tuple = ()
    any_float: bool = False
    in_place: bool = False

    @property
    def summary(self) -> str:
        """The statement's first line."""
        return self.statement.splitlines()[0]

    @property
    def mistakes(self) -> dict[str, Callable[..., np.ndarray]]:
        """The usual mistakes in this function: what to tell whoever has their numbers, and the wrong function."""
        return {m.sentence: wrong for m in MISTAKES.values() if (wrong := m.function(self.name))}


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
    ),
    Exercise(
        name="rope_frequencies",
        arguments="head_dim, theta",
        statement="""\
How far each pair of a head's numbers rotates per position, in radians.

    θ_j = theta^(-2j/K)        j = 0, 1, ..., K/2 - 1, K = head_dim -> float32 [K/2]

The first pair rotates by 1 radian per position, each further one more slowly.""",
        real="ops.rope_frequencies",
        reference=ops.rope_frequencies,
        rest=(None, np.float32),
        cases=lambda: [(8, 10000.0), (64, 500000.0)],
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
        reference=ops.causal_mask,
        rest=(np.float32,),
        cases=mask_cases,
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
    ),
)


def find(name: str) -> Exercise:
    """The exercise of this name; ValueError where there is none."""
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    raise ValueError(f"there is no exercise {name!r}: expected one of {', '.join(exercise.name for exercise in EXERCISES)}")
