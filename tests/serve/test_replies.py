"""Test tokens as texts and bytes, and OpenAI's two forms of log-probabilities."""

from __future__ import annotations

import json
import math

import pytest

import npllama
from npllama.serve.replies import LegacyLogprobs, bytes_of, chat_logprobs, text_of
from npllama.text.completion import TokenLogprobs


@pytest.fixture(scope="module")
def tokenizer():
    return npllama.load().tokenizer


def test_a_token_that_is_no_text_alone_is_shown_by_its_bytes(tokenizer):
    ids = tokenizer.encode("☃")
    assert b"".join(bytes_of(tokenizer, id) for id in ids) == "☃".encode()
    assert text_of(tokenizer, ids[0]) == r"bytes:\xe2"
    assert text_of(tokenizer, tokenizer.bos_id) == "<|begin_of_text|>"
    assert text_of(None, 3) == ""


def test_offsets_count_characters_and_go_on_from_piece_to_piece(tokenizer):
    lists, text = LegacyLogprobs(tokenizer), "é ROMEO"
    ids = tokenizer.encode(text)
    found = [offset for id in ids for offset in lists.take([id], [TokenLogprobs(id, "", -1.0, [])])["text_offset"]]
    assert found == [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(len(ids))]
    assert len({*found}) > 2


def test_tokens_of_one_text_keep_the_likeliest(tokenizer):
    first, second = tokenizer.encode("☃")[:2]
    entry = TokenLogprobs(first, "", -1.0, [(first, "", -1.0), (first, "", -2.0), (second, "", -3.0)])
    assert LegacyLogprobs(tokenizer).take([first], [entry])["top_logprobs"] == [
        {r"bytes:\xe2": -1.0, text_of(tokenizer, second): -3.0}
    ]
    (content,) = chat_logprobs(tokenizer, [entry])["content"]
    assert content["bytes"] == [0xE2]
    assert [top["logprob"] for top in content["top_logprobs"]] == [-1.0, -2.0, -3.0]


def test_infinite_log_probabilities_are_null(tokenizer):
    """Write JSON for a token that the logits rule out, and for NaN: it has neither number."""
    entry = TokenLogprobs(5, "", -math.inf, [(6, "", -1.0), (7, "", -math.inf), (8, "", math.nan)])
    found = LegacyLogprobs(tokenizer).take([5], [entry])
    assert found["token_logprobs"] == [None]
    assert list(found["top_logprobs"][0].values()) == [-1.0, None, None]
    chat = chat_logprobs(tokenizer, [entry])
    assert [top["logprob"] for top in chat["content"][0]["top_logprobs"]] == [-1.0, None, None]
    json.dumps([found, chat], allow_nan=False)
