"""Run the forward pass in other precisions: float64 as the gold, float32, and simulated bfloat16 and float16.

A simulated 16-bit value is a float32 number that the 16-bit format has too. Every operation computes in float32 on such numbers
and rounds its result to the nearest, ties to even, as torch's eager mode does on the CPU: each torch operation that returns a
16-bit tensor is one rounding. Matrix products accumulate in float32 and round once at the end. Weights are rounded once.

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

The last rounding of each operation is where every activation passes, at the tap; only what is rounded inside an operation needs
operations of its own.

A profile is a precision with the further roundings of a quantised port, PARTS, as llama.cpp does them on a CPU:
`profile("float32")`, `profile("bfloat16-hf")`, `profile("int8-activations+float16-cache")`. Parts round the inputs of products,
which no tap shows. They are the same numbers in float64 and float32, so that a float64 pass with the parts is the exact result
of the profile.
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
from ..engine.weights import Shard, Weight, to_bfloat16, widen
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
    """Round to 8 bits in blocks of 32, as llama.cpp rounds what it multiplies by Q8_0, Q4_0 and the like; as the dtype of x.

    y = d · rint(x / d), d = max|x| / 127 of the block, by which the integers are multiplied as a float16    [..., n] -> like x
    """
    blocks = _in_blocks(x, 32)
    d = np.max(np.abs(blocks), axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d > 0, 1 / d, np.float32(0))
    return _out_of_blocks(np.rint(blocks * inverse) * round_float16(d), x)


def round_q8_k(x: np.ndarray) -> np.ndarray:
    """Round to 8 bits in blocks of 256, as llama.cpp rounds what it multiplies by Q4_K, Q6_K and the like; as the dtype of x.

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
    """Keep keys and values in float16; what they are multiplied by, queries and weights, is rounded likewise."""

    def r(x: np.ndarray) -> np.ndarray:
        return round_float16(x).astype(x.dtype)

    def attention_scores(q: np.ndarray, keys: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return made.attention_scores(r(q), r(keys), mask)

    def attention_heads(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        return made.attention_heads(r(weights), r(values))

    return replace(made, attention_scores=attention_scores, attention_heads=attention_heads)


def rounded_inputs(made: Ops, r: Round) -> Ops:
    """Round what is multiplied by weights."""

    def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
        return made.linear(r(x), weight)

    def linears(x: np.ndarray, *weights: Weight) -> list[np.ndarray]:
        return made.linears(r(x), *weights)

    return replace(made, linear=linear, linears=linears)


PARTS: dict[str, Callable[[Ops], Ops]] = {
    "float16-cache": float16_cache,
    "int8-activations": functools.partial(rounded_inputs, r=round_q8_0),
    "int8-activations-256": functools.partial(rounded_inputs, r=round_q8_k),
    "int8-activations-sums": functools.partial(rounded_inputs, r=round_q8_0),  # for Q4_1, Q5_1: sums in float16, not simulated
    "float16-activations": functools.partial(rounded_inputs, r=lambda x: round_float16(x).astype(x.dtype)),
    "bfloat16-activations": functools.partial(rounded_inputs, r=lambda x: round_bfloat16(x).astype(x.dtype)),
}


def rounding_ops(r: Round, convention: str) -> Ops:
    """ops.py with the roundings that happen before an operation's last."""

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
    """Parameters made from others of the same names as they are asked for, so that one at a time is held twice."""

    def __init__(self, params: Mapping[str, Weight], make: Callable[[str], Weight]):
        self._params, self._make = params, make

    def __getitem__(self, name: str) -> Weight:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


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
        """Return the profile from which profile() would make this precision."""
        name = self.name + ("-hf" if self.convention == "hf" else "")
        return "+".join((*(() if self.parts and name == "float32" else (name,)), *self.parts))

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
        made = rounding_ops(ROUND[self.name], self.convention or "meta") if self.name in ROUND else None
        for part in self.parts:
            made = PARTS[part](made or model.PLAIN)
        return made

    def params(self, params: Params) -> Params:
        """Return the parameters in this precision, cast when they are used; packed ones that need no cast stay packed.

        Those in groups are widened to the numbers that they stand for, so that a quantised port differs by arithmetic alone.
        """
        as_they_are = {
            "float32": (np.float32, np.float16, np.uint16, np.int8),
            "bfloat16": (np.uint16,),
            "float16": (np.float16,),
        }

        if isinstance(params, Spread):  # each rank casts its own
            if self.parts:  # blocks of numbers that are rounded together may lie on two ranks
                raise ValueError(f"several processes don't compute in the profile {self.profile}: expected one process")
            return params.computed_in(self)

        def cast(weight: Weight) -> Weight:
            if isinstance(weight, Shard):
                return weight.with_numbers(cast)
            if not isinstance(weight, Grouped) and weight.dtype in as_they_are.get(self.name, (np.float64,)):
                return weight
            return self.round(widen(weight))

        return LazyParams(params, lambda name: cast(params[name]))

    def forward(
        self,
        params: Params,
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None = None,
        tap: Tap | None = None,
        last_only: bool = False,
    ) -> np.ndarray:
        """model.forward() in this precision; a tap sees rounded activations, and what it returns goes on unrounded."""
        if self.name in ROUND:
            watch, r = tap, ROUND[self.name]

            def tap(name: str, x: np.ndarray) -> np.ndarray:
                return r(x) if watch is None else watch(name, r(x))

        return model.forward(self.params(params), config, tokens, cache, tap, last_only, self.ops)


class SequentialSums(Precision):
    """Float32 whose norms and softmax sum as a loop would, one number after the other."""

    @property
    def profile(self) -> str:
        """Return a name that profile() doesn't know, as no program is judged by it."""
        return "+".join(("sequential-sums", *self.parts))

    @functools.cached_property
    def ops(self) -> Ops:
        """Return the operations, with parts or without."""
        made = sequential_norms(model.PLAIN)
        for part in self.parts:
            made = PARTS[part](made)
        return made


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
    """Return the precision whose `profile` this is, as the ranks of a model send it."""
    return SequentialSums() if name == SequentialSums().profile else profile(name)


INPUTS = (
    "-activations",
    "-activations-256",
    "-activations-sums",
)  # what the names of parts end in that round the inputs of the same products
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
    "float16-activations",
    "bfloat16-activations",
)


def profile(text: str) -> Precision:
    """Return the precision that a profile names: one of PRECISIONS, `-hf` behind 16 bits, parts, with + between them.

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
