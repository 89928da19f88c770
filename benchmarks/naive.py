"""Compute Llama as a first NumPy port does, for a baseline. It is right, and slow for reasons that are easy to overlook:

- np.sqrt() of a Python number is a float64 scalar, and so are the RoPE tables: after the first layer everything is float64,
  and each product copies its float32 weight into float64 first;
- keys and values are repeated for every query head;
- the cache grows by np.concatenate, which copies it for every token;
- every pass computes the RoPE tables again, and the logits of every position.
"""

from __future__ import annotations

import numpy as np

from npllama import Config

Cache = dict[int, tuple[np.ndarray, np.ndarray]]


def forward(params: dict[str, np.ndarray], config: Config, tokens: np.ndarray, cache: Cache, start: int) -> np.ndarray:
    """Return the logits after each token, `start` tokens being in the cache.    int [T] -> [T, V]"""
    x = params["tok_embeddings.weight"][tokens]
    cos, sin = rope_tables(config, start + len(tokens))
    cos, sin = cos[start:, None], sin[start:, None]
    mask = np.triu(np.full((len(tokens), start + len(tokens)), -np.inf), k=start + 1)
    for layer in range(config.n_layers):
        weights = {name.split(".", 2)[2]: w for name, w in params.items() if name.startswith(f"layers.{layer}.")}
        x = x + attention(rms_norm(x, weights["attention_norm.weight"], config), weights, config, layer, cos, sin, mask, cache)
        x = x + feed_forward(rms_norm(x, weights["ffn_norm.weight"], config), weights)
    x = rms_norm(x, params["norm.weight"], config)
    return x @ params["tok_embeddings.weight" if config.tied_embeddings else "output.weight"].T


def rms_norm(x: np.ndarray, weight: np.ndarray, config: Config) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * weight


def rope_tables(config: Config, n: int) -> tuple[np.ndarray, np.ndarray]:
    frequencies = 1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.outer(np.arange(n), frequencies)
    return np.cos(angles), np.sin(angles)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def attention(
    x: np.ndarray, weights: dict[str, np.ndarray], config: Config, layer: int, cos: np.ndarray, sin: np.ndarray,
    mask: np.ndarray, cache: Cache,
) -> np.ndarray:  # fmt: skip
    T, repeats = len(x), config.n_heads // config.n_kv_heads
    q = rope((x @ weights["attention.wq.weight"].T).reshape(T, config.n_heads, -1), cos, sin)
    k = rope((x @ weights["attention.wk.weight"].T).reshape(T, config.n_kv_heads, -1), cos, sin)
    v = (x @ weights["attention.wv.weight"].T).reshape(T, config.n_kv_heads, -1)
    if layer in cache:
        k = np.concatenate([cache[layer][0], k])
        v = np.concatenate([cache[layer][1], v])
    cache[layer] = k, v
    k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / np.sqrt(config.head_dim) + mask
    heads = softmax(scores) @ v.transpose(1, 0, 2)
    return heads.transpose(1, 0, 2).reshape(T, -1) @ weights["attention.wo.weight"].T


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def feed_forward(x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    gate = x @ weights["feed_forward.w1.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ weights["feed_forward.w3.weight"].T)) @ weights["feed_forward.w2.weight"].T
