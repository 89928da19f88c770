"""The forward pass of Llama.

Dimension key, used all over the project:

    B  batch          T  new tokens         S  all tokens so far (slots of the cache)
    D  dim            F  ffn_dim            V  vocab_size
    H  query heads    G  key/value heads    R  H / G        K  head_dim

`...` stands for no axis or for B: one code serves a single sequence and a batch. Functions take the data first and the scope
`s` last (scope.py): s["wq"] is a weight, s.ops.softmax an operation, and s.see("q", x) names an activation.

Papers: LLaMA (Touvron et al. 2023, arXiv:2302.13971), Llama 2 (arXiv:2307.09288), Llama 3 (arXiv:2407.21783).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .cache import KVCache
from .config import Config
from .engine import fast
from .engine.ranks.passes import by_all_ranks
from .scope import Array, Ops, Params, Scope, Tap

Rotation = tuple[Array, ...]  # what rope_rotation returns and rope takes

no_tap = None  # forward(tap=no_tap): nothing is recorded or replaced


@by_all_ranks
def forward(
    params: Params,
    config: Config,
    tokens: ArrayLike,
    cache: KVCache | None = None,
    tap: Tap | None = None,
    last_only: bool = False,
    ops: Ops | None = None,
) -> Array:
    """Return the logits of the token that follows each token.    int [..., T] -> [..., T, V], or [..., 1, V] with last_only

    params     name -> array, as config.parameter_shapes names them
    cache      keys and values of the tokens before these, to which these are added; a new one if not given
    tap        called as x = tap(name, x) on every activation, to record or replace it
    last_only  return the last slot's logits only, which saves most of the output matrix's work; then pad batches on the left
    ops        the operations; by default FAST without a tap and PLAIN with one, whose logits agree within rounding

    Negative ids are padding: nothing attends to them, and the row's other tokens keep the positions they would have without it.
    Rows of different lengths make a batch when padded; pad on the left if generation is to continue. The result has the dtype
    of the parameters; 16-bit and int8 parameters compute in float32.

    Raises ValueError for an id outside the vocabulary, for more tokens than the context holds, and for a tap that returns
    anything but an array of the activation's shape.
    """
    tokens = check_tokens(tokens, config)
    if cache is None:
        cache = KVCache(config, tokens.shape[:-1])
    s = Scope(params, config, cache, ops or (FAST if tap is None else PLAIN), tap)
    positions = cache.extend(tokens >= 0)  # [..., T]

    x = s.see("tok_embeddings", s.ops.embed(tokens, s["tok_embeddings"]))  # [..., T, D]
    frequencies = s.ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, x.dtype)
    rotation = s.ops.rope_rotation(positions, frequencies)
    mask = s.ops.causal_mask(positions, cache.positions, x.dtype)  # [..., 1, T, S]
    for layer in range(config.n_layers):
        x = block(x, rotation, mask, s.in_layer(layer))
    cache.commit()

    if last_only:
        x = x[..., -1:, :]
    x = s.see("norm", s.ops.rms_norm(x, s["norm"], config.norm_eps))
    return s.see("logits", s.ops.linear(x, s["tok_embeddings" if config.tied_embeddings else "output"]))  # [..., T, V]


def block(x: Array, rotation: Rotation, mask: Array, s: Scope) -> Array:
    """Apply one layer: attention, then feed-forward, each to the normed residual stream and added to it.    x [..., T, D]

    h = x + attention(rms_norm(x));  out = h + feed_forward(rms_norm(h))
    """
    normed = s.see("attention_norm", s.ops.rms_norm(x, s["attention_norm"], s.config.norm_eps))
    h = s.see("attention_residual", x + self_attention(normed, rotation, mask, s.under("attention")))
    normed = s.see("ffn_norm", s.ops.rms_norm(h, s["ffn_norm"], s.config.norm_eps))
    return s.see("out", h + s.ops.feed_forward(normed, s.under("feed_forward")))


def self_attention(x: Array, rotation: Rotation, mask: Array, s: Scope) -> Array:
    """Project to queries, keys and values, rotate, attend, and project back.    x [..., T, D] -> like x

    self_attention = wo concat_h(attention(rope(wq x), rope(wk x), wv x))
    """
    q, k, v = s.ops.linears(x, s["wq"], s["wk"], s["wv"])
    q = s.see("q", split_heads(q, s.config.n_heads))  # [..., T, H, K]
    k = s.see("k", split_heads(k, s.config.n_kv_heads))  # [..., T, G, K]
    v = s.see("v", split_heads(v, s.config.n_kv_heads))  # [..., T, G, K]
    q = s.see("q_rope", s.ops.rope(q, *rotation))
    k = s.see("k_rope", s.ops.rope(k, *rotation))
    keys, values = s.cache.update(s.layer, k, v)  # [..., G, S, K]
    heads = s.ops.attention(q, keys, values, mask, s)  # [..., T, H, K]
    return s.see("out", s.ops.linear(join_heads(heads), s["wo"]))


def attention(q: Array, keys: Array, values: Array, mask: Array, s: Scope) -> Array:
    """Average the values of the tokens up to each token, weighted by how well its query matches their keys.

    attention = softmax(q·k / sqrt(K) + mask) v        q [..., T, H, K], keys, values [..., G, S, K] -> [..., T, H, K]
    """
    scores = s.see("scores", s.ops.attention_scores(q, keys, mask))  # [..., H, T, S]
    weights = s.see("weights", s.ops.softmax(scores))
    return s.see("heads", s.ops.attention_heads(weights, values))


def feed_forward(x: Array, s: Scope) -> Array:
    """Transform each token by itself.    x [..., T, D] -> like x

    feed_forward = w2 (silu(w1 x) ⊙ w3 x)        ⊙ multiplies elementwise
    """
    gate, up = s.ops.linears(x, s["w1"], s["w3"])
    gate, up = s.see("gate", gate), s.see("up", up)  # [..., T, F]
    act = s.see("act", s.ops.swiglu(gate, up))
    return s.see("out", s.ops.linear(act, s["w2"]))


def split_heads(x: Array, n_heads: int) -> Array:
    """Cut rows into heads.    [..., T, heads·K] -> [..., T, heads, K]"""
    return x.reshape(*x.shape[:-1], n_heads, -1)


def join_heads(x: Array) -> Array:
    """Concatenate heads.    [..., T, heads, K] -> [..., T, heads·K]"""
    return x.reshape(*x.shape[:-2], -1)


def check_tokens(tokens: ArrayLike, config: Config) -> Array:
    """Return the ids as an integer array [..., T]; ValueError if there are none, or one is not below the vocabulary's size."""
    try:
        tokens = np.asarray(tokens)
    except ValueError:  # NumPy's message is "inhomogeneous shape"
        raise ValueError("rows of tokens have different lengths: expected the shorter ones padded with -1") from None
    if tokens.ndim == 0 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        found = f"shape {tokens.shape} and dtype {tokens.dtype}"
        raise ValueError(f"tokens of {found}: expected a list or an array of at least one whole number")
    if (largest := tokens.max()) >= config.vocab_size:
        raise ValueError(f"token id {largest} is outside the vocabulary: expected 0 to {config.vocab_size - 1}")
    return tokens


PLAIN = Ops(attention, feed_forward)  # the functions of this file and of ops.py: the tap sees every activation
FAST = fast.faster(PLAIN)  # a long prompt is shared among threads, and scores are never in memory whole
