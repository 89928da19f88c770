"""Test complete(): the same tokens as generate(), stop conditions, and log-probabilities."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import npllama
from npllama import Completion, Model, complete, forward, generate
from npllama.sampling import log_probabilities
from npllama.text.batching import Batch, Stalled

from tiny import CONFIGS, random_params

PROMPT = "ROMEO:\nIs the day so young?"


@pytest.fixture(scope="module")
def model() -> Model:
    return npllama.load()


def test_the_text_is_that_of_the_generated_tokens(model):
    tokenizer = model.tokenizer
    ids = tokenizer.encode(PROMPT, bos=True)
    options = {"max_tokens": 30, "temperature": 0.8, "top_p": 0.9, "seed": 5, "repetition_penalty": 1.2}
    expected = list(generate(model, ids, **options))
    found = complete(model, PROMPT, **options)
    assert found == Completion(tokenizer.decode(expected), expected, "length", None, ids)
    assert complete(model, ids, **options) == complete(model, np.array(ids), **options) == found
    assert complete(model, PROMPT, **{**options, "seed": 6}).tokens != expected


def test_a_stop_string_ends_the_text_before_it(model):
    whole = complete(model, PROMPT, max_tokens=40)
    stop = whole.text[9:14]
    found = complete(model, PROMPT, max_tokens=40, stop=["no such thing", stop])
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish_reason == "stop"
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert stop in model.tokenizer.decode(found.tokens)
    assert complete(model, PROMPT, max_tokens=40, stop=stop) == found
    last = complete(model, PROMPT, max_tokens=len(found.tokens), stop=stop)  # the stop string ends in the last token allowed
    assert last == found


def test_every_finish_reason(model):
    tokens = complete(model, PROMPT, max_tokens=9).tokens
    at = next(i for i in range(3, 9) if tokens[i] not in tokens[:i])
    stopped = complete(model, PROMPT, max_tokens=9, stop_ids=[tokens[at]])
    assert (stopped.tokens, stopped.finish_reason) == (tokens[:at], "stop")
    assert complete(model, PROMPT, max_tokens=0) == dataclasses.replace(stopped, text="", tokens=[], finish_reason="length")
    n = len(stopped.prompt_tokens)
    for room in (n, n + 1, n + 5):
        short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_seq_len=room))
        for found in (complete(short, PROMPT), complete(short, [PROMPT, "x"])[0]):
            assert (found.tokens, found.finish_reason) == (tokens[: room - n + 1], "context")
        stop_id = complete(short, PROMPT, stop_ids=[tokens[at]])
        assert stop_id.finish_reason == ("stop" if room - n >= at else "context")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_log_probabilities_are_those_of_the_uncached_pass(model, temperature):
    found = complete(model, PROMPT, max_tokens=12, temperature=temperature, logprobs=3)
    logits = forward(model.params, model.config, found.prompt_tokens + found.tokens)[len(found.prompt_tokens) - 1 : -1]
    assert len(found.logprobs) == 12
    for row, entry, token in zip(log_probabilities(logits), found.logprobs, found.tokens, strict=True):
        assert (entry.token, entry.piece) == (token, model.tokenizer.piece(token))
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert [id for id, _, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [logprob for _, _, logprob in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)
    assert complete(model, PROMPT, max_tokens=2, logprobs=0).logprobs[1].top == []


def test_a_batch_is_each_prompt_alone(model):
    prompts = [PROMPT, "The ", "KING HENRY V:\nOnce more", "Enter", "What is", "", "Second", "A\n", "All:\n", "No, "]
    found = complete(model, iter(prompts), max_tokens=9, stop="\n", logprobs=1)
    alone = [complete(model, prompt, max_tokens=9, stop="\n", logprobs=1) for prompt in prompts]
    for a, b in zip(found, alone, strict=True):
        assert (a.text, a.tokens, a.finish_reason, a.prompt_tokens) == (b.text, b.tokens, b.finish_reason, b.prompt_tokens)
        assert [x.logprob for x in a.logprobs] == pytest.approx([x.logprob for x in b.logprobs], abs=1e-4)
    drawn = complete(model, [PROMPT] * 3, max_tokens=9, temperature=1.0, seed=4)
    assert len({c.text for c in drawn}) == 3  # each has a random stream of its own
    assert drawn == complete(model, [PROMPT] * 3, max_tokens=9, temperature=1.0, seed=4)
    assert [c.text for c in complete(model, [[1, 2], np.array([3])], max_tokens=0)] == ["", ""]


def test_a_batch_that_makes_nothing_is_an_error_and_no_loop_for_ever(monkeypatch):
    model = Model(CONFIGS["grouped"], random_params(CONFIGS["grouped"], seed=1))
    monkeypatch.setattr(Batch, "step", lambda batch: [])
    with pytest.raises(Stalled, match="2 texts have not left, 0 of them with a full context"):
        complete(model, [[1, 2], [3]])


def test_a_stream_never_breaks_a_character_and_holds_back_what_may_stop_it(model):
    whole = complete(model, PROMPT, max_tokens=60, temperature=3.0, seed=1)
    stream = complete(model, PROMPT, max_tokens=60, temperature=3.0, seed=1, stream=True)
    assert stream.completion.finish_reason is None
    first = next(stream)
    assert stream.completion.text == first
    pieces = [first, *stream]
    assert "".join(pieces) == whole.text
    assert stream.completion == whole
    assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in whole.text
    stop = whole.text[10:16]
    stopped = list(complete(model, PROMPT, max_tokens=60, temperature=3.0, seed=1, stop=stop, stream=True))
    assert "".join(stopped) == whole.text[: whole.text.index(stop)]


def test_a_model_without_a_tokenizer_takes_ids():
    config = CONFIGS["grouped"]
    model = Model(config, random_params(config, seed=1))
    found = complete(model, [5, 6, 7], max_tokens=6, logprobs=1)
    assert (found.text, found.tokens) == ("", list(generate(model, [5, 6, 7], max_tokens=6)))
    assert found.logprobs[0].piece == ""
    with pytest.raises(ValueError, match="has no tokenizer: found text, expected token ids"):
        complete(model, "text")
    with pytest.raises(ValueError, match="has no tokenizer, so stop strings can't be used"):
        complete(model, [5], stop="x")


@pytest.mark.parametrize(
    ("prompt", "options", "line"),
    [
        ([], {}, "there is no prompt"),
        (["a", "b"], {"stream": True}, "stream takes one prompt, found 2"),
        (["a", "b"], {"lookup": 3}, "lookup takes one prompt, found 2"),
        ("a", {"stop": ""}, r"the stop strings are \[''\], expected a list of texts that are not empty"),
        ("a", {"logprobs": -1}, "logprobs is -1, expected 0 or more"),
        ("a", {"max_tokens": -1}, "max_tokens is -1, expected 0 or more"),
        ("a", {"repetition_penalty": 0}, "repetition_penalty is 0, expected more than 0"),
        ("word " * 600, {}, r"the prompt has \d+ tokens, the model's context holds 512"),
        (["a", "word " * 600], {}, r"the prompt has \d+ tokens, the model's context holds 512"),
        ([5, 99999], {}, "token id 99999 is outside the vocabulary"),
    ],
)
def test_what_can_not_be_completed_is_refused_in_one_line(model, prompt, options, line):
    with pytest.raises(ValueError, match=line):
        complete(model, prompt, **options)


def test_generate_says_what_takes_text(model):
    with pytest.raises(ValueError, match=r"a prompt of text: expected token ids; npllama.complete\(model, text\) takes text"):
        generate(model, PROMPT)
