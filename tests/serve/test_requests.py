"""Test the checks of requests' JSON, without a server."""

from __future__ import annotations

import pytest

from npllama.sampling import Sampling
from npllama.serve.requests import BadRequest, chat_request, completion_request


def test_what_is_left_out_is_the_models_recommendation_or_openais_default():
    assert completion_request({"prompt": "x"}, {}).sampling == Sampling(1.0)
    assert completion_request({"prompt": "x"}, {"temperature": None, "top_p": None}).sampling == Sampling(1.0)
    assert completion_request({"prompt": "x"}, {"temperature": 0.6, "top_p": 0.9}).sampling == Sampling(0.6, 0, 0.9)
    asked = completion_request({"prompt": "x", "temperature": 0, "top_k": 3, "min_p": 0.1}, {"temperature": 0.6})
    assert asked.sampling == Sampling(0, 3, 1.0, 0.1)
    assert completion_request({"prompt": "x"}, {}).max_tokens == 16
    assert chat_request({"messages": [{"role": "user", "content": "x"}]}, {}).max_tokens is None


def test_without_a_seed_each_request_has_its_own():
    assert completion_request({"prompt": "x"}, {}).seed != completion_request({"prompt": "x"}, {}).seed
    assert completion_request({"prompt": "x", "seed": 7}, {}).seed == 7


@pytest.mark.parametrize("given", ["x", [1, 2]])
def test_one_prompt(given):
    assert completion_request({"prompt": given}, {}).prompts == (given,)


@pytest.mark.parametrize("given", [["x", "y"], [[1, 2], [3]]])
def test_several_prompts(given):
    assert completion_request({"prompt": given}, {}).prompts == tuple(given)


@pytest.mark.parametrize("given", [None, 3, {}, [], [1, "x"], [[]], [[True]], [True], [1.0]])
def test_no_prompt(given):
    with pytest.raises(BadRequest) as caught:
        completion_request({"prompt": given}, {})
    assert caught.value.param == "prompt"


def test_the_newer_name_of_max_tokens_and_the_older():
    messages = [{"role": "user", "content": "x"}]
    assert chat_request({"messages": messages, "max_completion_tokens": 5}, {}).max_tokens == 5
    assert chat_request({"messages": messages, "max_tokens": 6}, {}).max_tokens == 6


def test_messages_are_texts_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat_request({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]}, {})
    assert asked.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "ab"})
    with pytest.raises(BadRequest, match=r"messages\[0\] has 'tool_calls'"):
        chat_request({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, {})


def test_null_is_what_is_left_out():
    nulls = dict.fromkeys(["max_tokens", "temperature", "stop", "seed", "logprobs", "suffix", "logit_bias", "stream"])
    assert completion_request({"prompt": "x", **nulls}, {}).max_tokens == 16


def test_zero_is_not_false_nor_one_true():
    for name, value in (("echo", 1), ("stream", 0), ("n", True), ("logprobs", False), ("store", 0)):
        with pytest.raises(BadRequest) as caught:
            completion_request({"prompt": "x", name: value}, {})
        assert caught.value.param == name
