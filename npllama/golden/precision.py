"""Run the forward pass in other precisions: float64 as the reference, float32, and simulated bfloat16 and float16.

A simulated 16-bit value is a float32 number that the 16-bit format can represent. Every operation computes in float32 on such
numbers and rounds its result to the nearest, ties to even, as torch's eager mode does on the CPU: each torch operation that
returns a 16-bit tensor is one rounding. Matrix products accumulate in float32 and round once at the end. Weights are rounded
once.

Where r() rounds, operation by operation. "meta" is llama3/model.py of llama-models 0.3.0; "hf" is modeling_llama.py of
transformers 5.23 with eager attention. Their norms and softmax round at the same places; RoPE and the scale differ.

| activation | meta | hf |
|---|---|---|
| tok_embeddings | the rounded weights' rows | the same |
| attention_norm, ffn_norm, norm | r(r(x / sqrt(mean(x²) + eps)) · weight)   RMSNorm.forward | the same   LlamaRMSNorm.forward |
| q, k, v, out, gate, up, logits | r(x Wᵀ)   ColumnParallelLinear, RowParallelLinear | the same   nn.Linear |
| q_rope, k_rope | r(x · e^(i·m·θ)), complex numbers in float32   apply_rotary_emb | r(r(x·r(cos)) ± r(x'·r(sin)))
    LlamaRotaryEmbedding.forward, apply_rotary_pos_emb |
| scores | r(r(q·k) / sqrt(K)) + mask   Attention.forward | r(r(q·k) · K^-0.5) + mask   eager_attention_forward |
| weights | r(softmax), all of it in float32   F.softmax(scores.float()).type_as(xq) | the same   softmax(dtype=torch.float32) |
| heads | r(weights · v)   torch.matmul | the same |
| attention_residual, out | r(x + y)   TransformerBlock.forward | the same   LlamaDecoderLayer.forward |
| act | r(r(silu(gate)) · up)   FeedForward.forward | the same   LlamaMLP.forward |

RoPE's frequencies and angles are float32 in both. (`model.bfloat16()` on a Hugging Face model rounds the frequencies too, which
`from_pretrained(dtype=torch.bfloat16)` doesn't: that is not simulated.) Meta's Transformer.forward returns `output(h).float()`,
which changes no value.

The last rounding of each operation is done by the tap, through which every activation passes. Only roundings inside an
operation need a version of that operation.

A rounding profile names a precision and the further roundings of a quantised port, PARTS, as llama.cpp does them on a CPU:
`profile("float32")`, `profile("bfloat16-hf")`, `profile("int8-activations+float16-cache")`. Parts round the inputs of products,
which no tap shows. They round to the same numbers in float64 and float32, so that a float64 pass with the parts is the exact
result of the profile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .. import model, ops
from ..cache import KVCache
from ..config import Config
from ..engine.grouped import Grouped
from ..engine.ranks.passes import Spread
from ..engine.weights import Dense, Shard, Weight, to_bfloat16, widen
from ..scope import Ops, Params, Tap

PRECISIONS = ("float64", "float32", "bfloat16", "float16")
CONVENTIONS = ("meta", "hf")

Round = Callable[[np.ndarray], np.ndarray]


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round each float32 to the nearest bfloat16, ties to even, as float32; beyond the largest it becomes infinite."""
    return widen(to_bfloat16(x))


def round_float16(x: np.ndarray) -> np.ndarray:
    """Round each float32 to the nearest IEEE half-precision number, ties to even, as float32; beyond 65504 it is infinite."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


ROUND: dict[str, Round] = {"bfloat16": round_bfloat16, "float16": round_float16}


def round_q8_0(x: np.ndarray) -> np.ndarray:
    """Round to 8 bits in blocks of 32, as llama.cpp rounds the inputs of Q8_0, Q4_0 and similar weights; in the dtype of x.

    y = d · rint(x / d), d = max|x| / 127 of the block, by which the integers are multiplied as a float16    [..., n] -> like x
    """
    q, d = _eight_bits(x)
    return _out_of_blocks(q * round_float16(d), x)


def error_of_q8_1_sums(x: np.ndarray) -> np.ndarray:
    """Return the rounding error of each block's sum as llama.cpp's Q8_1 stores it, in float16.    [..., n] -> [..., n / 32]

    s - Σ y, s = d · Σ rint(x / d) rounded to float16, y as in round_q8_0
    """
    q, d = _eight_bits(x)
    total = np.sum(q, axis=-1, keepdims=True)  # of whole numbers: exact
    return (round_float16(d * total).astype(np.float64) - round_float16(d) * total)[..., 0].astype(x.dtype)


def _eight_bits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the whole numbers of each block of 32 and its scale, in float32.    [..., n] -> [..., n / 32, 32 and 1]"""
    blocks = _in_blocks(x, 32)
    d = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d > 0, 1 / d, np.float32(0))
    return np.rint(blocks * inverse), d


def round_q8_k(x: np.ndarray) -> np.ndarray:
    """Round to 8 bits in blocks of 256, as llama.cpp rounds the inputs of Q4_K, Q6_K and similar weights; in the dtype of x.

    y = d · rint(x / d), d = -m / 127 for the number m of the block that is largest in magnitude    [..., n] -> like x
    """
    blocks = _in_blocks(x, 256)
    largest = np.take_along_axis(blocks, np.argmax(np.abs(blocks), axis=-1)[..., None], axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest != 0, np.float32(-127) / largest, np.float32(0))
        d = np.where(largest != 0, 1 / inverse, np.float32(0))
    return _out_of_blocks(np.minimum(np.rint(blocks * inverse), np.float32(127)) * d, x)


def _in_blocks(x: np.ndarray, size: int) -> np.ndarray:
    """Cut rows into blocks of float32, the last one filled up with zeros.    [..., n] -> [..., n / size, size]"""
    rows = np.asarray(x, np.float32)
    short = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
    return np.pad(rows, short).reshape(*x.shape[:-1], -1, size)


def _out_of_blocks(blocks: np.ndarray, x: np.ndarray) -> np.ndarray:
    return blocks.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(x.dtype)


def float16_cache(made: Ops) -> Ops:
    """Keep keys and values in float16, and round the queries and weights that they are multiplied by to float16 too."""

    def r(x: np.ndarray) -> np.ndarray:
        return round_float16(x).astype(x.dtype)

    def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return made.attention_scores(r(q), r(keys), mask)

    def attention_heads(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return made.attention_heads(r(weights), r(values))

    return replace(made, attention_scores=attention_scores, attention_heads=attention_heads)


def rounded_inputs(made: Ops, r: Round) -> Ops:
    """Round the inputs of products with weights."""

    def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
        return made.linear(r(x), weight)

    def linears(x: np.ndarray, *weights: Weight) -> list[np.ndarray]:
        return made.linears(r(x), *weights)

    return replace(made, linear=linear, linears=linears)


class WithOffsets(Dense):
    """A matrix stored in groups of 32 columns with an offset each, whose products need the offsets separately.

    offsets  [out, in / 32]; None for a part of such a matrix, as an embedding's rows
    """

    __slots__ = ("offsets",)

    def __init__(self, values: np.ndarray, offsets: np.ndarray | None = None):
        super().__init__(values)
        self.offsets = offsets


def rounded_inputs_and_sums(made: Ops) -> Ops:
    """Round the inputs of products with weights to Q8_1, as llama.cpp does for Q4_1 and Q5_1.

    These weights are scale · q + offset, and llama.cpp multiplies the offset by the block's sum, which Q8_1 stores in float16:
    y = W round_q8_0(x) + offsets · error_of_q8_1_sums(x)
    """
    rounded = rounded_inputs(made, round_q8_0)

    def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
        y = rounded.linear(x, weight)
        if isinstance(weight, WithOffsets) and weight.offsets is not None:
            y = y + error_of_q8_1_sums(x) @ weight.offsets.T
        return y

    return replace(rounded, linear=linear, linears=lambda x, *weights: [linear(x, weight) for weight in weights])


SUMS = "int8-activations-sums"  # the part that needs weights as they are stored: Precision.weight()
PARTS: dict[str, Callable[[Ops], Ops]] = {
    "float16-cache": float16_cache,
    "int8-activations": functools.partial(rounded_inputs, r=round_q8_0),
    "int8-activations-256": functools.partial(rounded_inputs, r=round_q8_k),
    SUMS: rounded_inputs_and_sums,
    "float16-activations": functools.partial(rounded_inputs, r=lambda x: round_float16(x).astype(x.dtype)),
    "bfloat16-activations": functools.partial(rounded_inputs, r=lambda x: round_bfloat16(x).astype(x.dtype)),
}


def rounding_ops(r: Round, convention: str) -> Ops:
    """Return the operations of ops.py with the roundings inside them, all but the last."""

    def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        return r(ops.rms_norm(x, np.ones_like(weight), eps)) * weight

    def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return r(ops.silu(gate)) * up

    def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        products, K = r(ops.query_key_products(q, keys)), q.shape[-1]
        return r(products * K**-0.5 if convention == "hf" else products / K**0.5) + mask

    def rope_rotation(positions: np.ndarray, frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = ops.rope_rotation(positions, frequencies)
        return r(cos), r(sin)

    def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        y = np.empty_like(x)
        y[..., 0::2] = r(even * cos) - r(odd * sin)
        y[..., 1::2] = r(even * sin) + r(odd * cos)
        return y

    meta = replace(model.PLAIN, rms_norm=rms_norm, swiglu=swiglu, attention_scores=attention_scores)
    return meta if convention == "meta" else replace(meta, rope_rotation=rope_rotation, rope=rope)


class LazyParams(Mapping[str, Weight]):
    """Parameters derived from others of the same names at each access, so that only one at a time is in memory twice."""

    def __init__(self, params: Mapping[str, Weight], make: Callable[[str], Weight]):
        self._params, self._make = params, make

    def __getitem__(self, name: str) -> Weight:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


AS_THEY_ARE: dict[str, tuple[type, ...]] = {  # precision -> storage that needs no cast
    "float32": (np.float32, np.float16, np.uint16, np.int8),
    "bfloat16": (np.uint16,),
    "float16": (np.float16,),
}


def has_offsets(weight: Weight) -> bool:
    """Return whether a weight is stored as Q4_1 and Q5_1 are: in groups of 32 columns with an offset each, in one level."""
    return isinstance(weight, Grouped) and weight.grouping.offset and weight.grouping.group == 32 and not weight.grouping.unit


@dataclass(frozen=True)
class Precision:
    """Describe one way to compute: a name of PRECISIONS and, for 16 bits, a name of CONVENTIONS for the rounding points.

    `parts` are names of PARTS: the roundings added to these. Raises ValueError for other names.
    """

    name: str = "float32"
    convention: str | None = None  # for 16 bits, None means "meta"; the others have none
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in PRECISIONS:
            raise ValueError(f"precision is {self.name!r}, expected {', '.join(PRECISIONS)}")
        if self.convention not in (None, *CONVENTIONS):
            raise ValueError(f"convention is {self.convention!r}, expected {' or '.join(CONVENTIONS)}")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"a part of the precision is {unknown[0]!r}, expected {', '.join(PARTS)}")
        object.__setattr__(self, "convention", (self.convention or "meta") if self.name in ROUND else None)

    @property
    def profile(self) -> str:
        """Return the name of this rounding profile, from which profile() makes the same precision."""
        name = self.name + ("-hf" if self.convention == "hf" else "")
        return "+".join((*(() if self.parts and name == "float32" else (name,)), *self.parts))

    @property
    def load_dtype(self) -> str:
        """Return the dtype to load a model with: "stored" where a part needs the offsets that are stored with the weights."""
        return "stored" if SUMS in self.parts else "auto"

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of activations: float64 for the precision float64, else float32."""
        return np.dtype(np.float64 if self.name == "float64" else np.float32)

    def round(self, x: np.ndarray) -> np.ndarray:
        """Round to the nearest numbers of this precision, in its dtype."""
        return ROUND.get(self.name, lambda x: x)(np.asarray(x).astype(self.dtype, copy=False))

    @functools.cached_property
    def ops(self) -> Ops | None:
        """Return the operations with the roundings inside them, for 16 bits and with parts; None for forward()'s own."""
        made = self.without_parts()
        for part in self.parts:
            made = PARTS[part](made or model.PLAIN)
        return made

    def without_parts(self) -> Ops | None:
        """Return the operations to which the parts add their roundings; None for forward()'s own."""
        return rounding_ops(ROUND[self.name], self.convention or "meta") if self.name in ROUND else None

    def params(self, params: Params) -> Params:
        """Return the parameters in this precision, cast when they are used; packed ones that need no cast stay packed.

        Those in groups are widened to the numbers that they represent, so that a quantised port differs only by its arithmetic.
        """
        if isinstance(params, Spread):  # each rank casts its own
            if self.parts:  # a block of numbers that are rounded together may be split between two ranks
                raise ValueError(f"the rounding profile {self.profile} is computed in one process only: found several")
            return params.computed_in(self)
        if SUMS in self.parts and not any(has_offsets(params[name]) for name in params):
            raise ValueError(
                f"the rounding profile {SUMS} rounds the inputs of Q4_1 and Q5_1 weights: found no such weights, expected a "
                'model that has them, loaded with dtype="stored"'
            )
        return LazyParams(params, lambda name: self.weight(params[name]))

    def weight(self, weight: Weight) -> Weight:
        """Return one parameter as params() does."""
        if isinstance(weight, Shard):
            return weight.with_numbers(self.weight)
        if isinstance(weight, Grouped):
            numbers = self.round(widen(weight))
            if SUMS in self.parts and has_offsets(weight):
                return WithOffsets(numbers, weight.all_levels()[1].T.astype(numbers.dtype))
            return numbers
        return weight if weight.dtype in AS_THEY_ARE.get(self.name, (np.float64,)) else self.round(widen(weight))

    def forward(
        self,
        params: Params,
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None = None,
        tap: Tap | None = None,
        last_only: bool = False,
    ) -> np.ndarray:
        """Run model.forward() in this precision; a tap gets rounded activations, and its results are used unrounded."""
        if self.name in ROUND:
            watch, r = tap, ROUND[self.name]

            def tap(name: str, x: np.ndarray) -> np.ndarray:
                return r(x) if watch is None else watch(name, r(x))

        return model.forward(self.params(params), config, tokens, cache, tap, last_only, self.ops)


class SequentialSums(Precision):
    """Float32 whose norms and softmax sum sequentially, as a loop does."""

    @property
    def profile(self) -> str:
        """Return a name that profile() doesn't accept, since no program is judged by this one."""
        return "+".join(("sequential-sums", *self.parts))

    def without_parts(self) -> Ops:
        """Return the plain operations, with other norms and softmax."""
        return sequential_norms(model.PLAIN)


def sequential_norms(made: Ops) -> Ops:
    """Sum in RMSNorm and softmax one number after the other, as a plain loop does."""

    def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        mean_square = np.cumsum(x * x, axis=-1)[..., -1:] / np.asarray(x.shape[-1], x.dtype)
        return x / np.sqrt(mean_square + eps) * weight

    def softmax(x: np.ndarray) -> np.ndarray:
        y = np.exp(x - np.max(x, axis=-1, keepdims=True))
        return y / np.cumsum(y, axis=-1)[..., -1:]

    return replace(made, rms_norm=rms_norm, softmax=softmax)


def named(name: str) -> Precision:
    """Return the precision of this name, as one rank sends it to another: a rounding profile, or that of SequentialSums."""
    return SequentialSums() if name == SequentialSums().profile else profile(name)


INPUTS = (
    "-activations",
    "-activations-256",
    "-activations-sums",
)  # endings of the parts that round inputs of products: only one of them may be given
PROFILES = (
    "float64",
    "float32",
    "bfloat16",
    "bfloat16-hf",
    "float16",
    "float16-hf",
    "float16-cache",
    "int8-activations",
    "int8-activations+float16-cache",
    "int8-activations-256",
    "int8-activations-256+float16-cache",
    SUMS,
    "float16-activations",
    "bfloat16-activations",
)


def profile(text: str) -> Precision:
    """Return the precision of a rounding profile: a precision (16 bits also with `-hf` appended), parts, or both joined by +.

    Raises ValueError.
    """
    first, *rest = text.split("+")
    name, convention = (first[:-3], "hf") if first.endswith("-hf") else (first, None)
    parts = tuple(rest)
    if first in PARTS:  # of float32
        name, convention, parts = "float32", None, (first, *rest)
    known = name in PRECISIONS and (convention is None or name in ROUND) and len(set(parts)) == len(parts)
    if not known or not set(parts) <= PARTS.keys() or sum(part.endswith(INPUTS) for part in parts) > 1:
        raise ValueError(f"profile is {text!r}, expected one such as {', '.join(PROFILES)}")
    return Precision(name, convention, parts)
