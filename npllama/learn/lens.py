"""Compute the quantities that pictures and page show: visible labels of tokens, the residual norms, the logit lens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np

from .. import ops
from ..activations import ADD, LAYER, stream_before
from ..checkpoint import Model
from ..config import Config
from ..engine.linear import linear, widen
from ..tokenizer import Tokenizer

SIGNS = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥"}


def visible(text: str) -> str:
    """Make each character of a token's text visible.

    Spaces, newlines and tabs become signs, a combining mark without a letter gets a dotted circle, a byte that isn't a
    character becomes `<0xE2>`, and a character without a glyph (a zero-width or no-break space) `<U+200B>`.
    """
    shown = "".join(map(_visible, text))
    return "◌" + shown if unicodedata.category(text[:1] or "a").startswith("M") else shown


def _visible(char: str) -> str:
    if char in SIGNS:
        return SIGNS[char]
    if "\udc80" <= char <= "\udcff":  # surrogateescape's code for a byte that is not UTF-8
        return f"<0x{ord(char) - 0xDC00:02X}>"
    return char if char.isprintable() else f"<U+{ord(char):04X}>"


def token_label(tokenizer: Tokenizer | None, id: int) -> str:
    """Return a token's visible text: special tokens by their spelling; without a tokenizer, or without a text, the id."""
    if tokenizer is None or not 0 <= id < tokenizer.vocab_size:  # a model may have more ids than its tokenizer
        return str(id)
    if id in tokenizer.silent_ids or id in tokenizer.special_tokens.values():
        return tokenizer.piece(id) or str(id)
    return visible(tokenizer.token_bytes(id, False).decode("utf-8", "surrogateescape")) or str(id)


def token_labels(tokenizer: Tokenizer | None, ids: Iterable[int]) -> list[str]:
    """Return the label of each token."""
    return [token_label(tokenizer, int(id)) for id in ids]


def residual_names(config: Config) -> list[str]:
    """List the activations that are the residual stream, in order: the embedding, then after attention and after each layer."""
    added = [row for row in LAYER if row.operation == ADD]
    return [stream_before(0), *(row.full_name(i) for i in range(config.n_layers) for row in added)]


def residual_norms(recording: Mapping[str, np.ndarray], config: Config) -> np.ndarray:
    """Compute the norm of each token's vector as it grows through the layers.

    ‖x‖ = sqrt(Σ x²)        -> [1 + 2 · n_layers, T], one row for each of residual_names()
    """
    return np.stack([np.linalg.norm(recording[name], axis=-1) for name in residual_names(config)])


def lens_names(config: Config) -> list[str]:
    """List the activations that the logit lens reads: the embedding, then each layer's output."""
    return [stream_before(i) for i in range(config.n_layers + 1)]


def logit_lens(model: Model, recording: Mapping[str, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the k likeliest next tokens and their probabilities after each layer, as if it were the last.

    softmax(output · rms_norm(x))        ids, probabilities: [1 + n_layers, T, k]
    nostalgebraist 2020, "interpreting GPT: the logit lens". The norm and the matrix are the model's own last two steps.
    """
    params, config = model.params, model.config
    output = params["tok_embeddings.weight" if config.tied_embeddings else "output.weight"]
    norm = widen(params["norm.weight"])
    ids, probabilities = [], []
    for name in lens_names(config):  # a layer at a time: its logits are [T, V]
        p = ops.softmax(linear(ops.rms_norm(recording[name], norm, config.norm_eps), output))
        likeliest = top(p, k)
        ids.append(likeliest)
        probabilities.append(np.take_along_axis(p, likeliest, axis=-1))
    return np.stack(ids), np.stack(probabilities)


def top(x: np.ndarray, k: int) -> np.ndarray:
    """Find the indices of the k largest along the last axis, the largest first.    [..., V] -> int [..., k]"""
    k = min(k, x.shape[-1])
    if k == 1:
        return np.argmax(x, axis=-1)[..., None]
    chosen = np.argpartition(-x, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(x, chosen, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, axis=-1)
