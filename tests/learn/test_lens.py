"""What pictures show: labels in which every character can be seen, norms and the logit lens from the taps."""

from __future__ import annotations

import numpy as np
import pytest

from npllama import forward, load, record
from npllama.checkpoint import Model
from npllama.learn.lens import lens_names, logit_lens, residual_names, residual_norms, token_label, token_labels, top, visible
from npllama.ops import softmax

from tiny import CONFIGS, random_params, random_tokens


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("\n\n\t", "↵↵⇥"),
        ("\r\n", "␍↵"),
        ("你好", "你好"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u200b", "<U+200B>"),
        ("\u00a0x", "<U+00A0>x"),
        ("\u3000", "<U+3000>"),
        ("\x1b[1m", "<U+001B>[1m"),
        ("a\udce4\udcbd", "a<0xE4><0xBD>"),
        ("$x$", "$x$"),
    ],
)
def test_every_character_of_a_label_can_be_seen(text, shown):
    assert visible(text) == shown


def test_labels_are_the_tokens(tiny_tiktoken, tiny_sentencepiece):
    ids = tiny_tiktoken.encode("hello world\n\n你", bos=True)
    assert token_labels(tiny_tiktoken, ids) == ["<|begin_of_text|>", "hello", "␣wor", "l", "d", "↵↵", "<0xE4><0xBD>", "<0xA0>"]
    assert token_labels(tiny_sentencepiece, [tiny_sentencepiece.bos_id]) == ["<s>"]
    assert token_label(tiny_sentencepiece, tiny_sentencepiece.encode("Once")[0]).startswith("␣")


def test_without_a_tokenizer_or_outside_it_the_id_is_the_label(tiny_tiktoken):
    assert token_label(None, 17) == "17"
    assert token_label(tiny_tiktoken, tiny_tiktoken.vocab_size) == str(tiny_tiktoken.vocab_size)


@pytest.mark.parametrize("name", ["grouped", "one_kv_head"])  # an output matrix of its own, and a tied one
@pytest.mark.parametrize("n_tokens", [1, 17])
def test_after_the_last_layer_the_lens_is_the_model(name, n_tokens):
    config = CONFIGS[name]
    model = Model(config, random_params(config, seed=3))
    tokens = random_tokens(config, 5, n_tokens)
    recording = record(model, tokens)
    ids, p = logit_lens(model, recording, 3)
    assert ids.shape == p.shape == (config.n_layers + 1, n_tokens, 3)
    expected = softmax(forward(model.params, config, tokens))
    assert np.array_equal(ids[-1], np.argsort(-expected, axis=-1, kind="stable")[:, :3])
    assert np.array_equal(p[-1], np.take_along_axis(expected, ids[-1], axis=-1))
    assert (p[0] != p[-1]).all(), "the embedding's own lens is not the last layer's"


def test_norms_are_those_of_the_residual_stream():
    model = load()
    tokens = model.tokenizer.encode("ROMEO: what light", bos=True)
    recording = record(model, tokens)
    norms = residual_norms(recording, model.config)
    assert norms.shape == (1 + 2 * model.config.n_layers, len(tokens))
    for name, row in zip(residual_names(model.config), norms, strict=True):
        assert np.allclose(row, np.sqrt(np.sum(recording[name].astype(np.float64) ** 2, axis=-1)), rtol=1e-5)
    assert set(lens_names(model.config)) <= set(residual_names(model.config)) <= set(recording)


def test_top_is_the_largest_first():
    x = np.random.default_rng(1).normal(size=(3, 50))
    for k in (1, 4, 80):
        assert np.array_equal(top(x, k), np.argsort(-x, axis=-1)[:, :k])
