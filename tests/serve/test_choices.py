"""Test the JSON of choices: the pieces of a stream joined are the whole."""

from __future__ import annotations

import pytest

import npllama
from npllama.sampling import Sampling
from npllama.serve.choices import ChatChoices, CompletionChoices
from npllama.serve.requests import chat_request, completion_request
from npllama.serve.worker import Job
from npllama.text.completion import Continuation


@pytest.fixture(scope="module")
def model():
    return npllama.load()


@pytest.mark.parametrize("kind", [CompletionChoices, ChatChoices])
def test_the_pieces_joined_are_the_whole(kind, model):
    if kind is ChatChoices:
        asked = chat_request({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}, {})
    else:
        asked = completion_request({"prompt": "ROMEO:", "logprobs": 2}, {})
    ids = model.tokenizer.encode("ROMEO:", bos=True)
    pieces = []

    def job():
        return Job(Continuation(model, ids, 6, logprobs=2), Sampling(), [0], lambda text: None, 6)

    told = job()
    stream = kind(model, "demo", asked, [told])
    for step in npllama.generation.generate_steps(model, ids, 6, Sampling()):
        text = told.continuation.push(step)
        done = told.continuation.completion
        pieces.append(stream.piece(0, told, text, len(done.tokens), told.ended))
    whole = kind(model, "demo", asked, [told]).whole(0, told)
    assert [piece["finish_reason"] for piece in pieces] == [None] * 5 + ["length"]
    assert whole["finish_reason"] == "length"
    if kind is ChatChoices:
        assert "".join(piece["delta"].get("content", "") for piece in pieces) == whole["message"]["content"]
        assert [entry for piece in pieces for entry in piece["logprobs"]["content"]] == whole["logprobs"]["content"]
    else:
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        for name, values in whole["logprobs"].items():
            assert [value for piece in pieces for value in piece["logprobs"][name]] == values
