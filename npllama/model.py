"""The forward pass of Llama.

Dimension key, used all over the project:

    B  batch          T  new tokens         S  all tokens so far (slots of the cache)
    D  dim            F  ffn_dim            V  vocab_size
    H  query heads    G  key/value heads    R  H / G        K  head_dim

`...` stands for nothing or for B: a single sequence and a batch are the same code.

Papers: LLaMA (Touvron et al. 2023, arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType, SimpleNamespace

import numpy as np
from numpy.typing import ArrayLike

from . import fast
from . import ops as plain_ops
from .cache import KVCache
from .config import Config
from .linear import Weight, embed, linear, linears
from .tap import checked

Array = np.ndarray
Params = Mapping[str, Weight]
Tap = Callable[[str, Array], Array]
Ops = ModuleType | SimpleNamespace
Rotation = tuple[Array, Array]


def no_tap(name: str, x: Array) -> Array:
    """Watch nothing. Any function of this form may record an activation, or return another in its place."""
    return x


def forward(
    params: Params,
    config: Config,
    tokens: ArrayLike,
    cache: KVCache | None = None,
    tap: Tap = no_tap,
    last_only: bool = False,
    ops: Ops = plain_ops,
) -> Array:
    """The logits of the token that follows each token.    int [..., T] -> [..., T, V], or [..., 1, V] with last_only

    params     name -> array, as config.parameter_shapes names them
    cache      the tokens before these, to which these are added; a new one if not given
    tap        called as x = tap(name, x) on every activation
    last_only  only after the last slot, which saves most of the output matrix's work; in a batch, pad on the left then
    ops        the operations: those of ops.py, or the same names with another precision's rounding (precision.py)

    Negative ids are padding: nothing attends to them, and the row's other tokens keep the positions they would have without.
    Rows of different lengths make a batch when padded; pad on the left if generation is to continue. The result has the dtype
    of the parameters; 16-bit and int8 parameters compute in float32.

    Raises ValueError for an id outside the vocabulary, for more tokens than the context holds, and for a tap that returns
    anything but an array of the activation's shape.
    """
    tokens = check_tokens(tokens, config)
    tap = tap if tap is no_tap else checked(tap)
    if cache is None:
        cache = KVCache(config, tokens.shape[:-1])
    positions = cache.extend(tokens >= 0)  # [..., T]

    x = tap("tok_embeddings", embed(tokens, params["tok_embeddings.weight"]))  # [..., T, D]
    frequencies = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, x.dtype)
    rotation = ops.rope_rotation(positions, frequencies)
    mask = ops.causal_mask(positions, cache.positions, x.dtype)  # [..., 1, T, S]
    for layer in range(config.n_layers):
        x = block(x, params, config, layer, rotation, mask, cache, tap, ops)
    cache.commit()

    if last_only:
        x = x[..., -1:, :]
    x = tap("norm", ops.rms_norm(x, params["norm.weight"], config.norm_eps))
    output = params["tok_embeddings.weight" if config.tied_embeddings else "output.weight"]
    return tap("logits", linear(x, output))  # [..., T, V]


def block(
    x: Array, params: Params, config: Config, layer: int, rotation: Rotation, mask: Array, cache: KVCache, tap: Tap, ops: Ops
) -> Array:
    """One layer: attention, then feed-forward, each on the normed residual stream and added to it.    x [..., T, D] -> like x

    h = x + attention(rms_norm(x));  out = h + feed_forward(rms_norm(h))
    """
    name = f"layers.{layer}."
    normed = tap(name + "attention_norm", ops.rms_norm(x, params[name + "attention_norm.weight"], config.norm_eps))
    h = tap(name + "attention_residual", x + self_attention(normed, params, config, layer, rotation, mask, cache, tap, ops))
    normed = tap(name + "ffn_norm", ops.rms_norm(h, params[name + "ffn_norm.weight"], config.norm_eps))
    ffn = partial(feed_forward, params=params, layer=layer, tap=tap, ops=ops)
    # Each token goes through it by itself: unless somebody watches, those of a long prompt are split among threads.
    return tap(name + "out", h + (fast.by_token(ffn, normed) if tap is no_tap else ffn(normed)))


def self_attention(
    x: Array, params: Params, config: Config, layer: int, rotation: Rotation, mask: Array, cache: KVCache, tap: Tap, ops: Ops
) -> Array:
    """Let each token look at the tokens up to itself, with grouped queries.    x [..., T, D] -> like x

    attention = wo (concat over heads of softmax(q·k / sqrt(K) + mask) v)
    """
    name = f"layers.{layer}.attention."
    q, k, v = linears(x, params[name + "wq.weight"], params[name + "wk.weight"], params[name + "wv.weight"])
    q = tap(name + "q", split_heads(q, config.n_heads))  # [..., T, H, K]
    k = tap(name + "k", split_heads(k, config.n_kv_heads))  # [..., T, G, K]
    v = tap(name + "v", split_heads(v, config.n_kv_heads))  # [..., T, G, K]
    q = tap(name + "q_rope", ops.rope(q, *rotation))
    k = tap(name + "k_rope", ops.rope(k, *rotation))
    keys, values = cache.update(layer, k, v)  # [..., G, S, K]
    if tap is no_tap and ops is plain_ops:  # nobody looks at the scores: they needn't be in memory whole
        heads = fast.attention(q, keys, values, mask)
    else:
        scores = tap(name + "scores", ops.attention_scores(q, keys, mask))  # [..., H, T, S]
        weights = tap(name + "weights", ops.softmax(scores))
        heads = tap(name + "heads", ops.attention_heads(weights, values))  # [..., T, H, K]
    return tap(name + "out", linear(join_heads(heads), params[name + "wo.weight"]))


def feed_forward(x: Array, params: Params, layer: int, tap: Tap, ops: Ops) -> Array:
    """Work on each token by itself.    x [..., T, D] -> like x

    feed_forward = w2 (silu(w1 x) ⊙ (w3 x))        ⊙ multiplies number by number
    """
    name = f"layers.{layer}.feed_forward."
    gate, up = linears(x, params[name + "w1.weight"], params[name + "w3.weight"])
    gate, up = tap(name + "gate", gate), tap(name + "up", up)  # [..., T, F]
    act = tap(name + "act", ops.swiglu(gate, up))
    return tap(name + "out", linear(act, params[name + "w2.weight"]))


def split_heads(x: Array, n_heads: int) -> Array:
    """[..., T, heads·K] -> [..., T, heads, K]"""
    return x.reshape(*x.shape[:-1], n_heads, -1)


def join_heads(x: Array) -> Array:
    """[..., T, heads, K] -> [..., T, heads·K]"""
    return x.reshape(*x.shape[:-2], -1)


def check_tokens(tokens: ArrayLike, config: Config) -> Array:
    """The ids as an integer array [..., T]; ValueError if there are none, or one is not below the vocabulary's size."""
    try:
        tokens = np.asarray(tokens)
    except ValueError:  # NumPy's words for it are "inhomogeneous shape"
        raise ValueError("rows of tokens have different lengths: expected the shorter ones padded with -1") from None
    if tokens.ndim == 0 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        found = f"shape {tokens.shape} and dtype {tokens.dtype}"
        raise ValueError(f"tokens of {found}: expected a list or an array of at least one whole number")
    if (largest := tokens.max()) >= config.vocab_size:
        raise ValueError(f"token id {largest} is outside the vocabulary: expected 0 to {config.vocab_size - 1}")
    return tokens
