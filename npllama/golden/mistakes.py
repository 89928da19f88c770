"""List the usual mistakes of ports of Llama, to build wrong programs and to recognise their numbers.

A mistake replaces one part of a correct pass. `Port("half_split")` computes with it, for traces and tests; compare's hints
apply it to a candidate's own numbers and check whether it predicts the candidate's result; the exercises recognise a student's
mistake by its numbers. Wrong functions have the signatures of the correct ones: those of ops.py and linear.py, and for the
cache and for sampling those of exercises 9 and 10. If several explain the same numbers, the first in the list is named.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import model, ops
from ..activations import LAYER, STREAM, TABLE, stream_before
from ..cache import PADDING, KVCache
from ..config import Config, LinearRopeScaling, RopeScaling
from ..engine import linear
from ..engine.linear import Weight, widen
from ..sampling import Sampling, probabilities
from ..scope import Array, Ops, Params, Tap
from .precision import ROUND, LazyParams, Precision, Round, round_bfloat16, round_float16


class Seen(Protocol):
    """Return known activations of the same layer and pass, by their names in the table."""

    def __call__(self, name: str, /) -> Array:
        """Return an activation of this pass; STREAM is the layer's input, the residual stream."""

    def slots(self, name: str, /) -> Array:
        """Return an activation of all tokens so far, in the layout of the cache.    [..., G, S, K]"""


@dataclass(frozen=True)
class Mistake:
    """Describe one mistake: its name, where it shows, and what it changes.

    name         for code
    sentence     for readers: the error, and the correct formula
    at           the activations that it makes wrong, given correct inputs; none for a mistake outside of forward()
    ops          fields of Ops -> wrong function
    constants    config -> wrong config
    parameters   (name, params, config) -> wrong weight of this name
    activations  activation -> (right numbers, Seen) -> wrong numbers
    cache        a wrong `cache_update`, of exercise 10
    sampling     a wrong `probabilities`, of exercise 9
    outside      functions of the conformance suite that no pass calls -> wrong function
    precision    computes in this precision where float32 is meant
    needs        the condition under which it shows: a key of NEEDS
    fitted       compare estimates its constant, and names that instead
    applies      returns whether it can show in a model of this config
    """

    name: str
    sentence: str
    at: tuple[str, ...] = ()
    ops: Mapping[str, Callable] = field(default_factory=dict)
    constants: Callable[[Config], Config] = lambda config: config
    parameters: Callable[[str, Params, Config], Weight] | None = None
    activations: Mapping[str, Callable[[Array, Seen], Array]] = field(default_factory=dict)
    cache: Callable[[Array, int, Array], Array] | None = None
    sampling: Callable[[Array, float, float], Array] | None = None
    outside: Mapping[str, Callable] = field(default_factory=dict)
    precision: str = "float32"
    needs: str = ""
    fitted: bool = False
    applies: Callable[[Config], bool] = lambda config: True

    def function(self, name: str) -> Callable[..., Array] | None:
        """Return the wrong function, if the mistake is in this function alone: an operation or an exercise's function."""
        functions = dict(self.outside) | dict(self.ops) | {"cache_update": self.cache, "probabilities": self.sampling}
        return functions.get(name) if len(self.ops) < 2 else None

    def params(self, params: Params, config: Config) -> Params:
        """Return the parameters of the wrong program, each computed at access."""
        change = self.parameters
        return LazyParams(params, lambda name: change(name, params, config)) if change else params


NEEDS = {
    "": "any tokens",
    "decode": "a pass after the first",
    "padding": "a batch with padding",
    "large": "numbers at which exp() overflows",
    "finite mask": "a mask with numbers other than 0 and -inf, which forward() never has",
    "error": "nothing: its shape doesn't fit the next operation, which raises ValueError",
}


_Stores = dict[tuple[int, str], Array]  # (layer, "k" or "v") -> its slots


class _Cache:
    """Cache that stores keys and values with a wrong cache_update(); the positions of its slots are correct."""

    def __init__(self, right: KVCache, update: Callable[[Array, int, Array], Array], stores: _Stores):
        self._right, self._update, self._stores = right, update, stores

    def __getattr__(self, name: str) -> object:
        return getattr(self._right, name)

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        return self._kept((layer, "k"), k), self._kept((layer, "v"), v)

    def _kept(self, key: tuple[int, str], new: Array) -> Array:
        *batch, _, G, K = new.shape
        store = self._stores.setdefault(key, np.zeros((*batch, G, self._right.max_seq_len, K), new.dtype))
        return self._update(store, self._right.length, new)


class _Seen:
    """Look up the activations of one pass, by names relative to one of them, and those of the passes before it."""

    def __init__(self, passes: list[dict[str, Array]], name: str):
        self._passes = passes
        in_layer = re.match(r"layers\.(\d+)\.", name)
        self._layer = int(in_layer[1]) if in_layer else None
        self._prefix = in_layer[0] if in_layer else ""
        self.name = name.removeprefix(self._prefix)

    def __call__(self, name: str) -> Array:
        layers = 1 + max(int(key.split(".")[1]) for key in self._passes[-1] if key.startswith("layers."))
        at = layers if self._layer is None else self._layer
        return self._passes[-1][stream_before(at) if name == STREAM else self._prefix + name]

    def slots(self, name: str) -> Array:
        return np.concatenate([seen[self._prefix + name] for seen in self._passes], axis=-3).swapaxes(-2, -3)


class Port(Precision):
    """Run the forward pass of a port with mistakes, in float32; accepted wherever a Precision is expected.

    Port("half_split", "transposed"), by their names in MISTAKES; further operations as keywords, such as rope=mine
    computed  the precision that it computes in: by default float32, or that of a mistake
    """

    mistakes: list[Mistake]
    computed: Precision
    made: Ops
    passes: WeakKeyDictionary[object, tuple[list[dict[str, Array]], _Stores]]  # keyed by the memory that a cache's views share

    def __init__(self, *names: str, computed: Precision | None = None, **replaced: Callable):
        super().__init__("float32")
        mistakes = [MISTAKES[name] for name in names]
        if computed is None:
            computed = Precision(next((m.precision for m in mistakes if m.precision != "float32"), "float32"))
        made = computed.ops or model.PLAIN
        for mistake in mistakes:
            made = replace(made, **mistake.ops)
        self.__dict__.update(  # a Precision is frozen
            mistakes=mistakes, computed=computed, made=replace(made, **replaced), passes=WeakKeyDictionary()
        )

    def forward(
        self,
        params: Params,
        config: Config,
        tokens: ArrayLike,
        cache: KVCache | None = None,
        tap: Tap | None = None,
        last_only: bool = False,
    ) -> Array:
        """Compute model.forward() with the mistakes; a tap gets the wrong activations."""
        cache = KVCache(config, np.shape(tokens)[:-1]) if cache is None else cache
        passes, stores = self.passes.setdefault(cache.view[0], ([], {}))
        passes.append({})
        for mistake in self.mistakes:
            params, config = mistake.params(params, config), mistake.constants(config)
            if mistake.cache:
                cache = _Cache(cache, mistake.cache, stores)  # type: ignore[assignment]  # KVCache's interface but for update()

        changes = [mistake.activations for mistake in self.mistakes if mistake.activations]

        def watch(name: str, x: Array) -> Array:
            x, seen = self.computed.round(x), _Seen(passes, name)
            for change in changes:
                x = change.get(seen.name, lambda x, seen: x)(x, seen)
            if changes:
                passes[-1][name] = x
            return x if tap is None else tap(name, x)

        return model.forward(self.computed.params(params), config, tokens, cache, watch, last_only, self.made)


# ----------------------------------------------------------------------------------------------- parts that mistakes share


def to_halves(x: Array) -> Array:
    """Reorder a head's numbers from adjacent pairs to Hugging Face's halves."""
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def to_pairs(x: Array) -> Array:
    """Reorder a head's numbers from Hugging Face's halves to adjacent pairs."""
    return np.stack(_halves(x), axis=-1).reshape(x.shape)


def _halves(x: Array) -> tuple[Array, Array]:
    first, second = np.split(x, 2, axis=-1)
    return first, second


def _rotated(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    return first * cos - second * sin, first * sin + second * cos


def _one_after_the_other(x: Array, cos: Array, sin: Array) -> Array:
    even = x[..., 0::2] * cos - x[..., 1::2] * sin
    return to_pairs(np.concatenate([even, even * sin + x[..., 1::2] * cos], axis=-1))


def _half_of_the_head(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    return np.concatenate([ops.rope(x, cos, sin)[..., :half], x[..., half:]], axis=-1)


def _slot_numbers(positions: Array) -> Array:
    """Count padding in the positions of a prompt; those of a single token are correct."""
    T = positions.shape[-1]
    return positions if T == 1 else np.broadcast_to(np.arange(T), positions.shape)


def _rounded(x: Array, r: Round = round_bfloat16) -> Array:
    return r(np.asarray(x, np.float32)).astype(x.dtype)


def _cut(x: Array) -> Array:
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def _bfloat16_ties_up(x: Array) -> Array:
    bits = np.asarray(x, np.float32).view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def _float16_cut(x: Array) -> Array:
    y = round_float16(x)
    bits = y.astype(np.float16).view(np.uint16)
    return np.where(np.abs(y) > np.abs(x), (bits - np.uint16(1)).view(np.float16).astype(np.float32), y)


def _float16_flushed(x: Array) -> Array:
    y = round_float16(x)
    return np.where(np.abs(y) < np.float32(2.0**-14), np.float32(0), y)


def _rotation_of_rounded_angles(positions: Array, frequencies: Array) -> tuple[Array, Array]:
    angles = _rounded(positions[..., None].astype(frequencies.dtype) * frequencies)[..., None, :]
    return np.cos(angles), np.sin(angles)


def _normalised(y: Array, axis: int | None = -1) -> Array:
    return y / np.sum(y, axis=axis, keepdims=True)


def _exp(x: Array, axis: int | None = -1) -> Array:
    return np.exp(x - np.max(x, axis=axis, keepdims=True))


def _mean_square(x: Array, axis: int | None = -1) -> Array:
    return np.mean(x * x, axis=axis, keepdims=True)


def _mask(visible: Array, dtype: DTypeLike, hidden: float = -math.inf) -> Array:
    return np.where(visible, np.zeros((), dtype), np.asarray(hidden, dtype))[..., None, :, :]


def _triangle(T: int, S: int, dtype: DTypeLike) -> Array:
    return _mask(np.tri(T, S, S - T, dtype=bool), dtype)


def _products(q: Array, keys: Array) -> Array:
    return ops.query_key_products(q, keys) / math.sqrt(q.shape[-1])


def _sharing(rule: Callable[[Array, int], Array], keys: bool = True, values: bool = True) -> dict[str, Callable]:
    """Return operations of attention in which query head h uses the key and value head rule(h, G)."""

    def spread(x: Array, H: int) -> Array:
        return x[..., rule(np.arange(H), x.shape[-3]), :, :]

    scores = {"attention_scores": lambda q, k, mask: ops.attention_scores(q, spread(k, q.shape[-2]), mask)}
    heads = {"attention_heads": lambda weights, v: ops.attention_heads(weights, spread(v, weights.shape[-3]))}
    return (scores if keys else {}) | (heads if values else {})


def _gelu_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _gelu_erf(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _linear(f: Callable[[Array, Array], Array]) -> dict[str, Callable]:
    """Return operations that compute every product with weights by f."""

    def product(x: Array, weight: Weight) -> Array:
        return f(x, widen(weight))

    return {"linear": product, "linears": lambda x, *weights: [product(x, weight) for weight in weights]}


def _transposed(name: str, params: Params, config: Config) -> Weight:
    weight = params[name]
    if len(weight.shape) < 2 or name.startswith("tok_embeddings"):
        return weight
    weight = widen(weight)
    return weight.reshape(weight.shape[::-1]).T


@dataclass(frozen=True)
class Taken:
    """Parameters in which one weight is another: wv is wk."""

    weight: str
    other: str

    def __call__(self, name: str, params: Params, config: Config) -> Weight:
        """Return the parameter of this name, or the other in its place."""
        prefix, found, rest = name.partition(f"{self.weight}.weight")
        return params[f"{prefix}{self.other}.weight" if found and not rest and prefix[-1:] in ("", ".") else name]


def _of_layer(number: Callable[[int], int], part: str = "") -> Callable[[str, Params, Config], Weight]:
    """Return parameters in which layer n has those of layer number(n) whose names begin with `part`."""

    def change(name: str, params: Params, config: Config) -> Weight:
        return params[re.sub(rf"^layers\.(\d+)\.(?={re.escape(part)})", lambda found: f"layers.{number(int(found[1]))}.", name)]

    return change


def _exchanged(name: str, params: Params, config: Config) -> Weight:
    return params[re.sub(r"w[13]\.weight$", lambda found: "w3.weight" if found[0][1] == "1" else "w1.weight", name)]


def _scaling_of(config: Config) -> RopeScaling | LinearRopeScaling:
    if config.rope_scaling is None:
        raise ValueError("the model's RoPE is not scaled, so its scaling can't be wrong")
    return config.rope_scaling


def _llama_3_scaling_of(config: Config) -> RopeScaling:
    if not isinstance(config.rope_scaling, RopeScaling):
        raise ValueError("the model's RoPE is not scaled as Llama 3.1's is, so that scaling can't be wrong")
    return config.rope_scaling


def _scaling(config: Config, **changes: Any) -> Config:
    return replace(config, rope_scaling=replace(_scaling_of(config), **changes))


def _llama_3_scaled(config: Config) -> bool:
    return isinstance(config.rope_scaling, RopeScaling)


def _chosen(p: Array, top_p: float, cut: Callable[[Array, float], Array]) -> Array:
    """Remove from p, sorted in descending order, the probabilities that `cut` selects, and normalise the rest."""
    order = np.argsort(-p, kind="stable")
    kept = p.copy()
    kept[order[cut(p[order], top_p)]] = 0
    return _normalised(kept)


def _beyond(p: Array, top_p: float) -> Array:
    """Return where more likely tokens already reach top_p: the correct cut."""
    return np.cumsum(p) - p >= top_p


def _sampled(cut: Callable[[Array, float], Array]) -> Callable[[Array, float, float], Array]:
    return lambda x, t, top_p: _chosen(ops.softmax(x / t), top_p, cut)


def _filtered(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> Array:
    return probabilities(logits, Sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p))


def _spelled_out(ids: list[int], specials: list[str]) -> list[int]:
    return [byte for id in ids for byte in (specials[id - 256].encode() if id >= 256 else [id])]


def _forged(ids: list[int], specials: list[str]) -> list[int]:
    text = "".join(map(chr, ids))  # a character for each id
    for n, spelling in enumerate(specials):
        text = text.replace(spelling, chr(256 + n))
    return [ord(char) for char in text]


def _at_least(p: Array, least: float) -> Array:
    return _normalised(np.where(p < least, 0.0, p))


def _of_the_longest_row(positions: Array) -> Array:
    """Give single tokens in a batch the largest position of any; those of a prompt are correct."""
    if positions.shape[-1] > 1:
        return positions
    return np.broadcast_to(np.max(positions, where=positions < PADDING, initial=0), positions.shape)


def _left_visible(cache: KVCache, kept: ArrayLike) -> None:
    """Cut rows back, but leave their old slots visible, with their numbers."""
    memory, lengths = cache.view[0], cache.lengths
    stores = [store for store in (*memory.keys, *memory.values) if store is not None]
    before = [store.copy() for store in stores]
    cache.truncate(kept)
    for store, numbers in zip(stores, before, strict=True):
        store[...] = numbers
    slots = np.arange(memory.positions.shape[-1])
    memory.positions[(slots >= cache.lengths[..., None]) & (slots < lengths[..., None])] = 0


def _write(store: Array, at: int, new: Array) -> None:
    """Write to the slots from `at` on the part of `new` that fits."""
    room = store[..., at : at + new.shape[-3], :]
    room[:] = new.swapaxes(-2, -3)[..., : room.shape[-2], :]


def _written(at: Callable[[int], int], end: Callable[[int, int], int | None]) -> Callable[[Array, int, Array], Array]:
    """Return a cache_update that writes to slot at(length) and returns the slots before end(length, T)."""

    def update(store: Array, length: int, new: Array) -> Array:
        _write(store, at(length), new)
        return store[..., : end(length, new.shape[-3]), :]

    return update


def _reshaped(store: Array, length: int, new: Array) -> Array:
    *batch, T, G, K = new.shape
    store[..., length : length + T, :] = new.reshape(*batch, G, T, K)
    return store[..., : length + T, :]


def _by_theta(theta: float) -> Callable[..., Array]:
    return lambda head_dim, _, scaling, dtype: ops.rope_frequencies(head_dim, theta, scaling, dtype)


def _theta_is_not(theta: float) -> Callable[[Config], bool]:
    return lambda config: config.rope_theta != theta


def _values_from(source: str) -> Callable[[Array, Seen], Array]:
    return lambda x, seen: ops.attention_heads(seen("attention.weights"), seen.slots(source))


def _of_rotated_values(x: Array, seen: Seen) -> Array:
    """Average values that are rotated by the angles of their keys, which are found in the keys before and after."""
    k, rotated, v = (_complex(seen.slots(f"attention.{name}")) for name in ("k", "k_rope", "v"))
    rotation = np.sum(rotated * k.conj(), axis=-3, keepdims=True)  # over the heads, whose angles are the same
    length = np.abs(rotation)
    values = v * (rotation / np.where(length, length, 1))
    return ops.attention_heads(seen("attention.weights"), to_pairs(np.concatenate([values.real, values.imag], axis=-1)))


def _complex(x: Array) -> Array:
    """Read adjacent pairs as complex numbers."""
    return x[..., 0::2] + 1j * x[..., 1::2]


def _only(name: str) -> Callable[[Array, Seen], Array]:
    return lambda x, seen: seen(name)


def _without(name: str) -> Callable[[Array, Seen], Array]:
    return lambda x, seen: x - seen(name)


def _sum_of(one: str, other: str) -> Callable[[Array, Seen], Array]:
    return lambda x, seen: seen(one) + seen(other)


# ------------------------------------------------------------------------------------------------------------------ the list

RESIDUALS = {"attention_residual": ("attention_norm", "attention.out"), "out": ("ffn_norm", "feed_forward.out")}
NORMS = tuple(row.name for row in TABLE.values() if row.operation == "rms_norm")
LINEARS = tuple(row.name for row in TABLE.values() if row.operation.startswith("linear"))
WEIGHTED = tuple(row.name for row in LAYER if row.weight)
QUERIES, ROTATED, SCORES = ("attention.q", "attention.k"), ("attention.q_rope", "attention.k_rope"), ("attention.scores",)
HEADS, ACT = ("attention.heads",), ("feed_forward.act",)


def _each(what: str, at: tuple[str, ...], *rows: tuple[Any, ...], **more: Any) -> Iterator[Mistake]:
    """Yield mistakes in one operation or another field of Mistake.    rows of name, sentence, wrong function, needs if any"""
    for name, sentence, function, *needs in rows:
        change: dict[str, Any] = {what: function} if what in ("cache", "sampling") else {"ops": {what: function}}
        yield Mistake(name, sentence, at, **change, needs="".join(needs), **more)


# A table: each row has a name, a sentence and the wrong function.
# fmt: off
_LIST = (
    # ----- the embedding
    *_each("embed", ("tok_embeddings",),
        ("embedding_scaled", "the embedding is multiplied by sqrt(D): Gemma does that, Llama uses the row unchanged",
            lambda tokens, weight: linear.embed(tokens, weight) * math.sqrt(weight.shape[-1])),
        ("ids_off_by_one", "token ids are off by one: each token has the embedding of the next id",
            lambda tokens, weight: linear.embed(np.minimum(tokens + 1, len(weight) - 1), weight)),
    ),
    # ----- norms
    *_each("rms_norm", NORMS,
        ("no_norm", "the norm is missing: these are its inputs", lambda x, weight, eps: x),
        ("no_norm_weight", "the norm's weight is missing: multiply by the learned weight at the end",
            lambda x, weight, eps: ops.rms_norm(x, np.ones_like(weight), eps)),
        ("norm_weight_plus_one",
            "the norm multiplies by 1 + weight: Gemma stores the weight so, Llama stores the factor itself",
            lambda x, weight, eps: ops.rms_norm(x, 1 + weight, eps)),
        ("norm_weight_first",
            "the norm's weight comes before the norm: divide by the root-mean-square first, then multiply by the weight",
            lambda x, weight, eps: ops.rms_norm(x * weight, np.ones_like(weight), eps)),
        ("layer_norm", "LayerNorm instead of RMSNorm: the mean is subtracted; RMSNorm only divides",
            lambda x, weight, eps: ops.rms_norm(x - np.mean(x, axis=-1, keepdims=True), weight, eps)),
        ("eps_outside_root", "eps is added after the square root: it belongs inside, sqrt(mean(x²) + eps)",
            lambda x, weight, eps: x / (np.sqrt(_mean_square(x)) + eps) * weight),
        ("norm_variance", "np.var and np.std subtract the mean before they square: RMSNorm has the mean of x² itself",
            lambda x, weight, eps: x / np.sqrt(np.var(x, axis=-1, keepdims=True) + eps) * weight),
        ("norm_sum", "the squares are summed, not averaged: RMS is the root of their mean",
            lambda x, weight, eps: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps) * weight),
        ("norm_over_tokens", "the norm's mean is over all tokens: each has its own, axis=-1 with keepdims=True",
            lambda x, weight, eps: x / np.sqrt(_mean_square(x, axis=None) + eps) * weight),
        ("norm_without_root", "the norm's square root is missing: divide by sqrt(mean(x²) + eps)",
            lambda x, weight, eps: x / (_mean_square(x) + eps) * weight),
    ),
    Mistake("no_eps", "eps is missing: small rows come out too large, and a row of zeros as NaN", NORMS,
        {"rms_norm": lambda x, weight, eps: x / np.sqrt(_mean_square(x)) * weight}, fitted=True),
    Mistake("eps", "eps is 1e-6 whatever the config says: LLaMA 1 has that, Llama 2 and 3 have 1e-5", NORMS,
        constants=lambda config: replace(config, norm_eps=1e-6), fitted=True, applies=lambda config: config.norm_eps != 1e-6),
    *(
        Mistake(f"{a}_from_{b}", f"the weight of {a} is that of {b}", (a,), parameters=Taken(a, b))
        for a, b in (("attention_norm", "ffn_norm"), ("ffn_norm", "attention_norm"))
    ),
    Mistake("no_last_norm", "the last norm is missing", ("norm",), activations={"norm": lambda x, seen: seen(STREAM)}),
    # ----- products with weights
    Mistake("rows_in_halves",
        "half-split order: it fits once each head's numbers are permuted from Hugging Face's halves to adjacent pairs, so "
        "wq or wk has Hugging Face's order of rows", QUERIES, activations=dict.fromkeys(QUERIES, lambda x, seen: to_halves(x))),
    Mistake("value_from_k", "the value is taken from k: wv is wk", ("attention.v",), parameters=Taken("wv", "wk")),
    Mistake("key_from_v", "the key is taken from v: wk is wv", ("attention.k",), parameters=Taken("wk", "wv")),
    Mistake("gate_from_up", "the gate is taken from up: w1 is w3", ("feed_forward.gate",), parameters=Taken("w1", "w3")),
    Mistake("up_from_gate", "up is taken from the gate: w3 is w1", ("feed_forward.up",), parameters=Taken("w3", "w1")),
    Mistake("w1_w3_exchanged", "w1 and w3 are exchanged", ("feed_forward.gate", "feed_forward.up"), parameters=_exchanged),
    Mistake("query_from_k", "the query is taken from k: wq is wk", ("attention.q",),
        parameters=Taken("wq", "wk"), applies=lambda config: config.n_heads == config.n_kv_heads),
    Mistake("output_from_embedding",
        "the output matrix is taken to be the embedding, but this model has one of its own (output.weight)", ("logits",),
        parameters=Taken("output", "tok_embeddings"), applies=lambda config: not config.tied_embeddings),
    Mistake("transposed",
        "transposed weights: the product is x · W with the [out, in] weight read as [in, out], not x · Wᵀ",
        LINEARS, parameters=_transposed),
    *(
        Mistake(f"layer_0_{name}", f"another layer's {what}: layer 0's instead of its own",
            tuple(name for name in WEIGHTED if name.startswith(part)),
            parameters=_of_layer(lambda n: 0, part), applies=lambda config: config.n_layers > 1)
        for name, what, part in (
            ("attention", "attention weights", "attention."),
            ("feed_forward", "feed-forward weights", "feed_forward."),
            ("everywhere", "weights", ""),
        )
    ),
    Mistake("previous_layers_weights", "another layer's weights: those of the layer before instead of its own", WEIGHTED,
        parameters=_of_layer(lambda n: max(n - 1, 0)), applies=lambda config: config.n_layers > 1),
    *(
        Mistake(f"{precision}_{name}",
            f"{precision} where float32 was meant: it fits the product with the {what} rounded to {precision}", LINEARS,
            _linear(f))
        for precision, r in ROUND.items()
        for name, what, f in (
            ("weights", "weights", lambda x, w, r=r: linear.linear(x, _rounded(w, r))),
            ("inputs", "inputs", lambda x, w, r=r: linear.linear(_rounded(x, r), w)),
            ("products", "weights and inputs", lambda x, w, r=r: linear.linear(_rounded(x, r), _rounded(w, r))),
        )
    ),
    Mistake("bfloat16_cut",
        "bfloat16 where float32 was meant, cut off instead of rounded: it fits the product with the weights cut to 16 bits",
        LINEARS, _linear(lambda x, w: linear.linear(x, _cut(w)))),
    Mistake("last_layer_missing", "the last layer is missing: its output goes into the last norm", ("logits",),
        constants=lambda config: replace(config, n_layers=config.n_layers - 1), applies=lambda config: config.n_layers > 1),
    # ----- RoPE
    Mistake("keys_unrotated_in_decode",
        "keys are not rotated in decode: those of the prompt are, and those of each new token must be too",
        ("attention.k_rope",),
        activations={"attention.k_rope": lambda x, seen: seen("attention.k") if x.shape[-3] == 1 else x}, needs="decode"),
    *_each("rope_rotation", ROTATED,
        ("positions_restart", "positions restart at 0 in each pass: those of new tokens go on after the tokens in the cache",
            lambda positions, frequencies: ops.rope_rotation(positions - positions.min(-1, keepdims=True), frequencies),
            "decode"),
        ("position_late_in_decode", "position off by one in decode: RoPE rotates each new token as if one more came before it",
            lambda positions, frequencies: ops.rope_rotation(positions + (positions.shape[-1] == 1), frequencies), "decode"),
        ("padding_counted", "padding is counted: RoPE's position is the slot's number, but only tokens count",
            lambda positions, frequencies: ops.rope_rotation(_slot_numbers(positions), frequencies), "padding"),
        ("position_of_the_longest_row",
            "the position of a new token is that of the batch's longest row: each row counts its own tokens",
            lambda positions, frequencies: ops.rope_rotation(_of_the_longest_row(positions), frequencies), "padding"),
    ),
    *_each("rope", ROTATED,
        ("half_split",
            "half-split RoPE: it rotates x[j] with x[j + K/2], which is Hugging Face's layout, whose wq and wk are permuted to "
            "match; Meta's pairs are adjacent, x[2j] with x[2j + 1]",
            lambda x, cos, sin: np.concatenate(_rotated(*_halves(x), cos, sin), axis=-1)),
        ("interleaved_on_halves",
            "interleaved RoPE on rows in Hugging Face's order: it rotates x[2j] with x[2j + 1], but in that order the pairs "
            "are x[j] with x[j + K/2]; with the rows permuted to adjacent pairs it fits",
            lambda x, cos, sin: to_pairs(ops.rope(to_halves(x), cos, sin))),
        ("no_rope", "no RoPE: the numbers are not rotated at all", lambda x, cos, sin: x),
        ("rope_backwards", "RoPE rotates backwards: the minus belongs to the first of the pair",
            lambda x, cos, sin: ops.rope(x, cos, -sin)),
        ("rope_apart",
            "all first numbers come before all second ones: put each back where it was, y[..., 0::2] and y[..., 1::2]",
            lambda x, cos, sin: to_halves(ops.rope(x, cos, sin))),
        ("rope_one_after_the_other",
            "the second number of a pair is made from the first one already rotated: both need the old x",
            _one_after_the_other),
        ("cos_sin_exchanged", "cos and sin are exchanged", lambda x, cos, sin: ops.rope(x, sin, cos)),
        ("half_of_the_head_rotated", "RoPE rotates the first half of each head only: Llama rotates all of it",
            _half_of_the_head),
    ),
    Mistake("keys_unrotated", "keys are not rotated, but queries are", ("attention.k_rope",),
        activations={"attention.k_rope": lambda x, seen: seen("attention.k")}),
    *_each("rope_rotation", ROTATED,
        *(
            (f"position_{abs(offset)}_{'late' if offset > 0 else 'early'}",
                f"position off by {by}: RoPE rotates each token by the angles of the position {by} "
                f"{'after' if offset > 0 else 'before'} its own",
                lambda positions, frequencies, offset=offset: ops.rope_rotation(positions + offset, frequencies))
            for by, offset in (("one", 1), ("one", -1), ("two", 2), ("two", -2))
        ),
        ("angles_in_bfloat16",
            "RoPE's angles are in bfloat16: from 128 radians on it has whole numbers only; compute them in float32",
            _rotation_of_rounded_angles),
        ("frequencies_in_bfloat16", "RoPE's frequencies are in bfloat16: they must stay in float32, as must their angles",
            lambda positions, frequencies: ops.rope_rotation(positions, _rounded(frequencies))),
        ("cos_sin_in_bfloat16", "RoPE's cosines and sines are in bfloat16 where float32 was meant",
            lambda positions, frequencies: tuple(map(_rounded, ops.rope_rotation(positions, frequencies)))),
    ),
    *_each("rope_frequencies", ROTATED,
        ("exponent_j", "the exponent is j/K instead of 2j/K, np.arange(0, head_dim, 2) / head_dim",
            lambda head_dim, theta, scaling, dtype: ops.rope_frequencies(head_dim, theta**0.5, scaling, dtype)),
        ("exponent_of_pairs", "2j is divided by K/2, the number of pairs, instead of K, which is head_dim",
            lambda head_dim, theta, scaling, dtype: ops.rope_frequencies(head_dim, theta**2, scaling, dtype)),
        fitted=True,
    ),
    *_each("rope_frequencies", ROTATED,
        ("theta_inverse", "the exponent has the wrong sign: the frequencies fall from 1, so it is theta^(-2j/K)",
            lambda head_dim, theta, scaling, dtype: ops.rope_frequencies(head_dim, 1 / theta, scaling, dtype)),
        ("frequency_per_number", "there is a frequency for each number: a pair shares one, so K/2 are expected",
            lambda head_dim, theta, scaling, dtype: ops.rope_frequencies(2 * head_dim, theta, scaling, dtype), "error"),
        ("frequencies_twice",
            "each frequency appears twice, as in Hugging Face's code: here a pair has one, so K/2 are expected",
            lambda head_dim, theta, scaling, dtype: np.tile(ops.rope_frequencies(head_dim, theta, scaling, dtype), 2), "error"),
    ),
    *(
        Mistake(f"theta_{theta:.0f}", f"theta is {theta:.0f} whatever the argument says: {who}", ROTATED,
            {"rope_frequencies": _by_theta(theta)},
            fitted=True, applies=_theta_is_not(theta))
        for theta, who in (
            (10000.0, "LLaMA 1 and 2 have that, Llama 3 has 500000"),
            (500000.0, "Llama 3 has that, LLaMA 1 and 2 have 10000"),
        )
    ),
    Mistake("no_scaling", "RoPE's scaling is missing: the angles are those of θ alone", ROTATED,
        constants=lambda config: replace(config, rope_scaling=None), applies=lambda config: config.rope_scaling is not None),
    Mistake("scale_factor", "RoPE's scale factor is 8 whatever the config says: Llama 3.1 has that, Llama 3.2 has 32", ROTATED,
        constants=lambda config: _scaling(config, factor=8.0), fitted=True,
        applies=lambda config: config.rope_scaling is not None and config.rope_scaling.factor != 8),
    Mistake("scaling_multiplies", "RoPE's frequencies are multiplied by the scale factor, not divided by it", ROTATED,
        constants=lambda config: _scaling(config, factor=1 / _scaling_of(config).factor),
        applies=lambda config: config.rope_scaling is not None),
    Mistake("scaling_of_all", "RoPE's scaling divides every frequency: Llama 3.1's divides those of long wavelengths only",
        ROTATED, constants=lambda config: replace(config, rope_scaling=LinearRopeScaling(_scaling_of(config).factor)),
        applies=_llama_3_scaled),
    Mistake("scaling_unblended",
        "RoPE's scaling doesn't blend: it keeps frequencies between the two limits, and expected is between θ and θ/factor",
        ROTATED,
        constants=lambda config: _scaling(config, high_freq_factor=_llama_3_scaling_of(config).low_freq_factor * (1 + 1e-9)),
        applies=_llama_3_scaled),
    Mistake("scaling_of_new_context",
        "RoPE's scaling uses the model's context length instead of the original one, before it was extended", ROTATED,
        constants=lambda config: _scaling(config, original_max_seq_len=config.max_seq_len),
        applies=lambda config: (
            _llama_3_scaled(config) and config.max_seq_len != _llama_3_scaling_of(config).original_max_seq_len)),
    # ----- the cache
    *_each("cache", SCORES + HEADS,
        ("cache_overwritten", "the new keys overwrite the first ones: they belong after the `length` slots in use",
            _written(lambda length: 0, lambda length, T: length + T), "decode"),
        ("cache_over_the_last",
            "the new key overwrites the last one: slots count from 0, so the first free one is slot `length`",
            _written(lambda length: max(0, length - 1), lambda length, T: length + T), "decode"),
        ("cache_empty_slot",
            "there is an empty slot after the prompt: slots count from 0, so the first free one is slot `length`",
            _written(lambda length: length + (length > 0), lambda length, T: length + (length > 0) + T), "error"),
        ("cache_whole", "the whole store is returned: its unused slots hold no token's keys, and would be attended to",
            _written(lambda length: length, lambda length, T: None), "error"),
        ("cache_new_alone", "only the new keys are returned: a query attends to those of every token so far",
            lambda store, length, new: new.swapaxes(-2, -3), "error"),
        ("cache_not_kept", "nothing stays in the store: the next call finds zeros where these keys should be",
            lambda store, length, new: np.concatenate([store[..., :length, :], new.swapaxes(-2, -3)], axis=-2), "decode"),
        ("cache_reshaped",
            "reshape keeps the order of the numbers, and so mixes tokens and heads: swap the axes, [T, G, K] to [G, T, K]",
            _reshaped),
    ),
    # ----- scores
    Mistake("no_mask", "the causal mask is missing: every token sees those after it", SCORES,
        {"attention_scores": lambda q, keys, mask: _products(q, keys)}),
    *_each("causal_mask", SCORES,
        ("mask_one_late",
            "position off by one in the causal mask: each token sees the one after it, the very one that it should predict",
            lambda q, s, dtype: ops.causal_mask(q + 1, s, dtype)),
        ("mask_one_early",
            "position off by one in the causal mask: a token doesn't see itself; the first then sees nothing, and its softmax "
            "is NaN", lambda q, s, dtype: ops.causal_mask(q - 1, s, dtype)),
        ("mask_one_early_but_first", "position off by one in the causal mask: no token but the first sees itself",
            lambda q, s, dtype: ops.causal_mask(np.maximum(q - 1, 0), s, dtype)),
        ("mask_reversed", "the causal mask is reversed: tokens see what comes after them, and not what came before",
            lambda q, s, dtype: _mask(s[..., None, :] >= q[..., :, None], dtype)),
        ("mask_of_indices",
            "a triangle of indices is right only for a prompt: with a cache, row 0 is a late token; compare positions",
            lambda q, s, dtype: _mask(np.tri(q.shape[-1], s.shape[-1], dtype=bool), dtype), "decode"),
        ("mask_of_slots",
            "padding leaks: a triangle shifted by S - T is right only while the slots are in order, without padding; compare "
            "positions", lambda q, s, dtype: _triangle(q.shape[-1], s.shape[-1], dtype), "padding"),
        ("mask_of_ones", "the mask is 1 and 0, as for multiplying: it is added to the scores, so expected are 0 and -inf",
            lambda q, s, dtype: _mask(s[..., None, :] > q[..., :, None], dtype, hidden=1)),
        ("mask_large_number", "the mask is a large negative number: only -inf always gives exactly 0 after softmax",
            lambda q, s, dtype: _mask(s[..., None, :] <= q[..., :, None], dtype, hidden=-1e9)),
        ("mask_lowest_number",
            "the mask is the lowest finite number: a query without visible keys would attend to masked ones; use -inf",
            lambda q, s, dtype: _mask(s[..., None, :] <= q[..., :, None], dtype, hidden=float(np.finfo(np.float32).min))),
        ("mask_wrong_sign", "the mask's sign is wrong: exp(-inf) is 0, but +inf makes the whole row NaN",
            lambda q, s, dtype: _mask(s[..., None, :] <= q[..., :, None], dtype, hidden=math.inf)),
        ("mask_multiplied", "0 times inf is NaN: choose with np.where instead of multiplying by -inf",
            lambda q, s, dtype: ((s[..., None, :] > q[..., :, None]) * np.asarray(-np.inf, dtype))[..., None, :, :]),
        ("mask_multiplied_reversed", "visible keys are masked, and 0 times inf is NaN: np.where(slot <= query, 0, -inf)",
            lambda q, s, dtype: ((s[..., None, :] <= q[..., :, None]) * np.asarray(-np.inf, dtype))[..., None, :, :]),
        ("mask_axes_exchanged", "the axes are exchanged: expected are a row per query and a column per slot, [1, T, S]",
            lambda q, s, dtype: _mask(s[..., :, None] <= q[..., None, :], dtype)),
    ),
    Mistake("padding_as_tokens",
        "padding leaks: the prompt's padding is attended to, and counted in its positions, as if it were tokens",
        ROTATED + SCORES, {
            "rope_rotation": lambda positions, frequencies: ops.rope_rotation(_slot_numbers(positions), frequencies),
            "causal_mask": lambda q, s, dtype: _triangle(q.shape[-1], s.shape[-1], dtype)}, needs="padding"),
    *_each("attention_scores", SCORES,
        ("unscaled", "1/sqrt(K) is missing: without it, softmax gives nearly all the weight to one key",
            lambda q, keys, mask: ops.query_key_products(q, keys) + mask),
        ("scaled_by_all_heads",
            "wrong scale: the scores are divided by the root of all heads' width, H·K, instead of one head's, K",
            lambda q, keys, mask: ops.query_key_products(q, keys) / math.sqrt(q.shape[-2] * q.shape[-1]) + mask),
        ("scaled_by_k",
            "wrong scale: the scores are divided by K instead of sqrt(K); it is the square root, q·k / sqrt(K)",
            lambda q, keys, mask: ops.query_key_products(q, keys) / q.shape[-1] + mask),
        ("mask_scaled", "the mask is scaled too: divide the products by sqrt(K) first, then add the mask",
            lambda q, keys, mask: _products(q, keys) + mask / math.sqrt(q.shape[-1]), "finite mask"),
        ("mask_of_its_own", "the mask is a triangle: add the argument `mask` instead, which also hides padding",
            lambda q, keys, mask: _products(q, keys) + _triangle(q.shape[-3], keys.shape[-2], q.dtype), "padding"),
        ("scores_transposed", "rows are keys and columns queries: [H, T, S] has a row for each query",
            lambda q, keys, mask: (_products(q, keys) + mask).swapaxes(-1, -2)),
    ),
    Mistake("scaled_by_dim", "wrong scale: the scores are divided by sqrt(D), D the model's width, instead of sqrt(K)", SCORES,
        activations={SCORES[0]: lambda x, seen: x * (seen("attention.q").shape[-1] / seen("attention_norm").shape[-1]) ** 0.5},
        applies=lambda config: config.dim not in (config.head_dim, config.n_heads * config.head_dim)),
    # ----- which key and value heads a query head uses
    *(
        Mistake(f"{which}_{name}",
            f"{which.replace('_', ' ')} are not repeated as grouped queries need: {how}, and neighbouring query heads share "
            "one, 0 0 1 1, as np.repeat does it (np.tile does not)",
            {"keys": SCORES, "values": HEADS}.get(which, SCORES + HEADS),
            _sharing(rule, keys=which != "values", values=which != "keys"), applies=applies)
        for name, how, rule, applies in (
            ("tiled", "they are tiled, 0 1 0 1", lambda h, G: h % G, lambda config: 1 < config.n_kv_heads < config.n_heads),
            ("of_the_last_head", "query heads beyond the first G use the last one",
                lambda h, G: np.minimum(h, G - 1), lambda config: 1 < config.n_kv_heads < config.n_heads),
            ("of_head_0", "all query heads use head 0", lambda h, G: 0 * h, lambda config: config.n_kv_heads > 1),
        )
        for which in ("keys", "values", "keys_and_values")
    ),
    # ----- softmax
    *_each("softmax", ("attention.weights",),
        ("softmax_overflow", "exp overflows at large scores, and inf / inf is NaN: subtract each row's maximum first",
            lambda x: _normalised(np.exp(x)), "large"),
        ("softmax_maximum_of_all",
            "the maximum is that of the whole array: where a row lies far below it, all its exp are 0; take each row's own",
            lambda x: _normalised(_exp(x, axis=None)), "large"),
        ("softmax_sum_of_all",
            "the sum goes over the whole array: each row is a distribution of its own, axis=-1 with keepdims=True",
            lambda x: _normalised(_exp(x), axis=None)),
        ("softmax_first_axis", "the sum goes along the first axis: the scores of one query lie along the last, axis=-1",
            lambda x: _normalised(_exp(x, axis=0), axis=0)),
        ("softmax_unnormalised", "the weights don't sum to one: divide by the sum of the exp along the last axis",
            _exp),
    ),
    # ----- heads
    *_each("attention_heads", HEADS,
        ("heads_before_tokens", "heads come before tokens, [H, T, K]: swap the two axes, so that a token's heads lie together",
            lambda weights, values: ops.attention_heads(weights, values).swapaxes(-2, -3), "error"),
        ("heads_reshaped", "reshape keeps the order of the numbers, and so mixes heads and tokens: swap the axes instead",
            lambda weights, values: (y := ops.attention_heads(weights, values)).swapaxes(-2, -3).reshape(y.shape)),
    ),
    *(
        Mistake(f"values_from_{source.partition('.')[2]}",
            f"the value is taken from k: the heads are averages of {source}, not of attention.v", HEADS,
            activations={HEADS[0]: _values_from(source)})
        for source in ("attention.k", "attention.k_rope")
    ),
    Mistake("values_rotated", "RoPE rotates the values too: only queries and keys are rotated", HEADS,
        activations={HEADS[0]: _of_rotated_values}),
    # ----- the residual stream
    *(
        mistake
        for kind, (normed, added) in RESIDUALS.items()
        for mistake in (
            Mistake(f"no_residual_{kind}", f"the residual connection is missing: it is {added} alone", (kind,),
                activations={kind: _only(added)}),
            Mistake(f"nothing_added_{kind}", f"{added} is not added: these are the numbers before the addition", (kind,),
                activations={kind: _without(added)}),
            Mistake(f"residual_after_norm_{kind}",
                f"the residual connection starts after the norm: {added} is added to {normed}, not to what went into it",
                (kind,), activations={kind: _sum_of(normed, added)}),
        )
    ),
    Mistake("residual_before_attention", "the feed-forward's residual connection starts before attention, whose output is lost",
        ("out",), activations={"out": lambda x, seen: seen(STREAM) + seen("feed_forward.out")}),
    Mistake("parallel_feed_forward",
        "the feed-forward reads what attention reads, as in GPT-J: in Llama it comes after attention, with a norm of its own",
        ("ffn_norm",), activations={"ffn_norm": lambda x, seen: seen("attention_norm")}),
    # ----- the feed-forward's activation
    *_each("swiglu", ACT,
        ("gate_up_exchanged",
            "the gate and up are exchanged: silu is applied to up, but it belongs to the gate, the product with w1",
            lambda gate, up: ops.swiglu(up, gate)),
        ("no_silu", "silu is missing: it is gate · up, and silu(gate) · up was expected", lambda gate, up: gate * up),
        ("no_up", "up is missing: the result is silu(gate) · up", lambda gate, up: ops.silu(gate)),
        ("gate_for_up", "the gate is taken for up: it is silu(gate) · gate, and silu(gate) · up was expected",
            lambda gate, up: ops.swiglu(gate, gate)),
        ("relu", "ReLU instead of silu in the feed-forward: silu(x) is x · σ(x)", lambda gate, up: np.maximum(gate, 0) * up),
        ("sigmoid", "the sigmoid instead of silu in the feed-forward: silu(x) is x · σ(x), the sigmoid times x itself",
            lambda gate, up: _sigmoid(gate) * up),
        ("gelu_tanh", "GELU instead of silu in the feed-forward, by its formula with tanh: silu(x) is x · σ(x)",
            lambda gate, up: _gelu_tanh(gate) * up),
        ("gelu_erf", "GELU instead of silu in the feed-forward, by its formula with erf: silu(x) is x · σ(x)",
            lambda gate, up: _gelu_erf(gate) * up),
        ("quick_gelu", "QuickGELU, x · σ(1.702 x), instead of silu in the feed-forward: silu(x) is x · σ(x)",
            lambda gate, up: ops.silu(1.702 * gate) / 1.702 * up),
        ("silu_overflow", "exp(x) / (1 + exp(x)) overflows at a large gate, and inf / inf is NaN: 1 / (1 + exp(-x)) does not",
            lambda gate, up: gate * (np.exp(gate) / (1 + np.exp(gate))) * up, "large"),
        ("silu_wrong_sign", "the exponent has the wrong sign: silu(x) = x / (1 + exp(-x))",
            lambda gate, up: gate / (1 + np.exp(gate)) * up),
    ),
    # ----- precision
    *(
        Mistake(precision, f"{precision} where float32 was meant", ("tok_embeddings",), precision=precision)
        for precision in ROUND
    ),
    # ----- sampling
    *_each("sampling", (),
        ("top_p_early", "top-p cuts too early: keep the token whose probability crosses top_p, and drop those after it",
            _sampled(lambda p, top_p: np.cumsum(p) > top_p)),
        ("top_p_early_but_first",
            "top-p cuts too early: keep whichever token's probability crosses top_p, not only the first token",
            _sampled(lambda p, top_p: (np.cumsum(p) > top_p) & (np.arange(len(p)) > 0))),
        ("top_p_late",
            "top-p keeps one token too many where the sum equals top_p exactly: compare with >=",
            _sampled(lambda p, top_p: np.cumsum(p) - p > top_p)),
        ("top_p_before_temperature",
            "top-p is applied before the temperature: divide by it first, and choose from the probabilities that result",
            lambda x, t, top_p: _normalised(ops.softmax(x / t) * (_chosen(ops.softmax(x), top_p, _beyond) > 0))),
        ("top_p_unsorted", "top-p adds up the probabilities in the order of the ids: sort them first, the most likely in front",
            lambda x, t, top_p: _normalised(np.where(_beyond(p := ops.softmax(x / t), top_p), np.float32(0), p))),
        ("temperature_multiplies",
            "the temperature multiplies: divide the logits by it, so that a high one makes the tokens more alike",
            lambda x, t, top_p: _chosen(ops.softmax(x * t), top_p, _beyond)),
        ("no_temperature",
            "the temperature has no effect (dividing probabilities by it is undone by normalising): divide the logits by it",
            lambda x, t, top_p: _chosen(ops.softmax(x), top_p, _beyond)),
        ("top_p_unnormalised", "what is left doesn't sum to one: divide by its sum after the cut",
            lambda x, t, top_p: ((_chosen(p := ops.softmax(x / t), top_p, _beyond) > 0) * p)),
        ("no_top_p", "no token is dropped: of the most likely tokens keep the fewest that together reach top_p",
            lambda x, t, top_p: ops.softmax(x / t)),
        ("sampling_overflow", "exp overflows at large logits: subtract their maximum first, as in softmax",
            lambda x, t, top_p: _chosen(_normalised(np.exp(x / t)), top_p, _beyond)),
    ),
    # ----- outside of a pass: what a config states
    *(
        Mistake(name, sentence, outside={"resolve_config": wrong})
        for name, sentence, wrong in (
            ("config_eps", "the config's eps is not read: 1e-6 is the program's default, rms_norm_eps has the value",
                lambda config: replace(config, norm_eps=1e-6)),
            ("config_eps_1e_5", "the config's eps is not read: 1e-5 is the program's default, LLaMA 1 has 1e-6",
                lambda config: replace(config, norm_eps=1e-5)),
            ("config_theta", "the config's θ is not read: 10000 is a default; transformers 5 writes it into rope_parameters",
                lambda config: replace(config, rope_theta=10000.0)),
            ("config_scaling", "the config's scaling is not read: transformers 5 has it in rope_parameters, GGUF as a tensor",
                lambda config: replace(config, rope_scaling=None)),
            ("config_factor", "the scale factor is 8 whatever is stated: Llama 3.1 has that, Llama 3.2 has 32",
                lambda config: _scaling(config, factor=8.0)),
            ("config_kv_heads", "the number of key heads is not read: it is that of query heads only where none is stated",
                lambda config: replace(config, n_kv_heads=config.n_heads)),
            ("config_head_dim", "head_dim is not read: it is dim / n_heads only where none is stated",
                lambda config: replace(config, head_dim=config.dim // config.n_heads)),
            ("config_tied", "whether the embeddings are tied is not read: the default is no, but Llama 3.2's are",
                lambda config: replace(config, tied_embeddings=False)),
            ("config_ffn_dim", "ffn_dim is 8/3 · dim without ffn_dim_multiplier, which multiplies before it is rounded up",
                lambda config: replace(config, ffn_dim=256 * -(-(8 * config.dim // 3) // 256))),
        )
    ),
    # ----- outside of a pass: tokenizers
    *(
        Mistake(name, sentence, outside={"encode": wrong})
        for name, sentence, wrong in (
            ("encode_bos", "BOS is in front of the ids, but it isn't part of the text",
                lambda text, encode, bos: [bos, *encode(text)]),
            ("encode_normalised", "the text is normalised first (NFKC): no tokenizer of Llama does that",
                lambda text, encode, bos: encode(unicodedata.normalize("NFKC", text))),
            ("encode_stripped", "spaces at the text's ends are stripped", lambda text, encode, bos: encode(text.strip())),
            ("encode_newlines", "line breaks all become newlines, as when a file is read in text mode",
                lambda text, encode, bos: encode(text.replace("\r\n", "\n").replace("\r", "\n"))),
            ("encode_words", "words are split at spaces, and encoded each with one space in front",
                lambda text, encode, bos: [id for word in text.split() for id in encode(" " + word)]),
            ("encode_specials", "a special token that the text spells becomes its id: it is text unless requested otherwise",
                lambda text, encode, bos: encode(text, special=True)),
            ("encode_ascii", "characters beyond ASCII are replaced by question marks",
                lambda text, encode, bos: encode(text.encode("ascii", "replace").decode())),
        )
    ),
    # ----- outside of a pass: chat formats
    *(
        Mistake(name, sentence, outside={"chat": wrong})
        for name, sentence, wrong in (
            ("chat_specials_as_text", "special tokens are encoded as text, by their spelling: each is one id of its own",
                lambda messages, right, specials: _spelled_out(right(messages), specials)),
            ("chat_text_as_specials", "a message that spells a special token forges it: such a spelling must stay text",
                lambda messages, right, specials: _forged(right(messages), specials)),
            ("chat_without_system", "the system message is lost",
                lambda messages, right, specials: right([m for m in messages if m["role"] != "system"])),
            ("chat_last_message", "the conversation before the last message is lost",
                lambda messages, right, specials: right(messages[-1:])),
            ("chat_without_newlines", "the line breaks of the format are missing",
                lambda messages, right, specials: [id for id in right(messages) if id != 10]),
            ("chat_contents_stripped", "spaces at the ends of contents are stripped, but this format keeps them",
                lambda messages, right, specials: right([{**m, "content": m["content"].strip()} for m in messages])),
            ("chat_without_bos", "BOS is missing",
                lambda messages, right, specials: right(messages)[1:]),
            ("chat_bos_twice", "BOS is there twice: from the format and from the tokenizer",
                lambda messages, right, specials: [256, *right(messages)]),
        )
    ),
    # ----- outside of a pass: chat templates
    *(
        Mistake(name, sentence, outside={"chat_template": wrong})
        for name, sentence, wrong in (
            ("template_untrimmed", "the line break after a block is kept, but trim_blocks is on",
                lambda render, *given: render(*given, trim_blocks=False)),
            ("template_indented", "the spaces before a block are kept, but lstrip_blocks is on",
                lambda render, *given: render(*given, lstrip_blocks=False)),
            ("template_newline_kept", "the template's last line break is kept, but keep_trailing_newline is off",
                lambda render, *given: render(*given, keep_trailing_newline=True)),
            ("template_without_prompt", "the beginning of the answer is missing, but add_generation_prompt is true",
                lambda render, *given: render(*given, add_generation_prompt=False)),
            ("template_own_tojson", "tojson is Jinja's, which escapes and sorts: expected is json.dumps(x, ensure_ascii=False)",
                lambda render, *given: render(*given, own_tojson=True)),
            ("template_bos_twice", "BOS is there twice: from the template and from the tokenizer",
                lambda render, template, messages, variables:
                    variables["bos_token"] + render(template, messages, variables)),
        )
    ),
    # ----- outside of a pass: the cache of several rows
    *(
        Mistake(name, sentence, outside={"truncate": wrong})
        for name, sentence, wrong in (
            ("cache_not_cut", "the cache is not cut back: new tokens come after those that should be forgotten",
                lambda cache, kept: None),
            ("rows_cut_alike", "all rows are cut back to the shortest one's length: each has a length of its own",
                lambda cache, kept: cache.truncate(np.min(kept))),
            ("slots_left_visible", "slots that a row gave up stay visible: mask all after its end, however long others are",
                _left_visible),
        )
    ),
    # ----- outside of a pass: filters of sampling
    *(
        Mistake(name, sentence, outside={"probabilities": wrong})
        for name, sentence, wrong in (
            ("top_k_not_applied", "top_k has no effect: keep that many of the most likely tokens",
                lambda x, t, k, top_p, min_p: _filtered(x, t, 0, top_p, min_p)),
            ("top_k_one_more", "top_k keeps one token too many",
                lambda x, t, k, top_p, min_p: _filtered(x, t, k + (k > 0), top_p, min_p)),
            ("min_p_absolute", "min_p is used as a probability: it is a share of the largest probability",
                lambda x, t, k, top_p, min_p: _at_least(_filtered(x, t, k, top_p, 0.0), min_p)),
            ("min_p_not_applied", "min_p has no effect: drop what is less than min_p times as likely as the likeliest token",
                lambda x, t, k, top_p, min_p: _filtered(x, t, k, top_p, 0.0)),
            ("greedy_at_0", "a temperature of 0 divides by zero: all of the probability belongs to the largest logit",
                lambda x, t, k, top_p, min_p: ops.softmax(x / t) if t == 0 else _filtered(x, t, k, top_p, min_p)),
        )
    ),
    # ----- outside of a pass: how numbers are stored
    *(
        Mistake(name, sentence, outside={function: wrong})
        for name, function, sentence, wrong in (
            ("rounding_bfloat16_cut", "round_bfloat16", "the lower 16 bits are cut off: round to the nearest bfloat16", _cut),
            ("rounding_bfloat16_ties_up", "round_bfloat16",
                "ties are rounded away from zero: of two equally near numbers, the one with an even last bit is right",
                _bfloat16_ties_up),
            ("rounding_float16_cut", "round_float16", "bits that float16 lacks are cut off: round to the nearest",
                _float16_cut),
            ("rounding_float16_flushed", "round_float16",
                "numbers below 2^-14 are rounded to zero: float16 has subnormal numbers down to 2^-24", _float16_flushed),
            ("scale_of_columns", "scale_of_rows", "the scales are those of columns: row i of the weight is scaled by scale[i]",
                lambda scale, weight: np.resize(scale, weight.shape[-1])[None, :]),
            ("scale_of_row_0", "scale_of_rows", "one scale for the whole matrix: row i of the weight is scaled by scale[i]",
                lambda scale, weight: scale[:1, None]),
            ("groups_interleaved", "scale_of_groups",
                "groups are interleaved: column j belongs to group j // 32, as np.repeat does it (np.tile does not)",
                lambda scale, weight: np.tile(scale, weight.shape[-1] // scale.shape[-1])),
            ("group_0_everywhere", "scale_of_groups", "one scale for each row: each group of 32 numbers has its own",
                lambda scale, weight: scale[:, :1]),
        )
    ),
)
# fmt: on
MISTAKES = {mistake.name: mistake for mistake in _LIST}
