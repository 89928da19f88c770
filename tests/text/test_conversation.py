"""Test Conversation: what a turn computes, what stays in the cache, and what is saved."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import npllama
from npllama import Conversation, Sampling
from npllama.chat import ChatFormat, chat_format


@pytest.fixture
def demo() -> npllama.Model:
    return npllama.load()


@pytest.fixture
def conversation(demo) -> Conversation:
    return Conversation(demo, "Be brief.", sampling=Sampling(), max_tokens=6)


def fresh(conversation: Conversation, question: str) -> str:
    """Return the answer computed without a cache from earlier turns."""
    messages = [*conversation.messages, {"role": "user", "content": question}]
    ids = chat_format(conversation.model).prompt(messages).ids
    sampling = dataclasses.asdict(conversation.sampling)
    return npllama.complete(conversation.model, ids, max_tokens=6, **sampling).text


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, repetition_penalty=1.3)], ids=["greedy", "penalty"])
def test_a_later_question_computes_only_what_is_new(demo, sampling):
    conversation, computed, contents = Conversation(demo, "Be brief.", sampling=sampling, max_tokens=6), [], ["Be brief."]
    for question in ("Who art thou? " * 5, "And I?", "What now?"):
        expected = fresh(conversation, question)
        assert conversation.say(question) == expected
        assert conversation.last.finish_reason == "length"
        computed.append(conversation.n_read)
        contents += [question, expected]
    assert [message["content"] for message in conversation.messages] == contents
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 3]
    # From the previous turn: the answer's last token, which was never an input, and the end of the turn; then the new turn.
    turn = len(chat_format(demo).prompt([{"role": "user", "content": "And I?"}]).ids) - 1
    assert computed[1] <= turn + 3
    assert max(computed[1:]) < computed[0] / 2


def test_after_a_reset_the_same_question_computes_one_token(conversation):
    first = conversation.say("Who art thou?")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert conversation.say("Who art thou?") == first
    assert conversation.n_read == 1


@pytest.mark.parametrize("how", ["closed", "left", "interrupted"])
def test_an_answer_that_is_not_finished_is_kept_and_the_cache_stays_right(demo, conversation, how, monkeypatch):
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    stream = conversation.stream("Who art thou?")
    answer = next(stream)
    if how == "closed":
        stream.close()
    elif how == "interrupted":
        monkeypatch.setattr(npllama.generation, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        monkeypatch.undo()
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who art thou?"}]
    history.append({"role": "assistant", "content": answer})
    copy = Conversation(demo, None, history, sampling=Sampling(), max_tokens=6)
    assert conversation.say("And I?") == copy.say("And I?")  # closes the stream if it was abandoned
    assert conversation.messages == copy.messages


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(conversation):
    conversation.say("Who art thou?")
    before = list(conversation.messages)
    with pytest.raises(
        npllama.ConversationError, match=r"the conversation has \d+ tokens, the model's context holds 512: reset"
    ):
        conversation.say("word " * 600)
    assert conversation.messages == before
    expected = fresh(conversation, "And I?")
    assert conversation.say("And I?") == expected


def test_a_stop_string_and_the_end_of_the_context(demo, conversation):
    whole = conversation.say("Who art thou?")
    stopped = Conversation(demo, "Be brief.", sampling=Sampling(), max_tokens=6, stop=whole[3:6])
    assert stopped.say("Who art thou?") == whole[: whole.index(whole[3:6])]
    assert stopped.last.finish_reason == "stop"
    n = len(conversation.last.prompt_tokens)
    short = dataclasses.replace(demo, config=dataclasses.replace(demo.config, max_seq_len=n + 2))
    full = Conversation(short, "Be brief.", sampling=Sampling())
    assert whole.startswith(full.say("Who art thou?"))
    assert full.last.finish_reason == "context"
    assert len(full.last.tokens) == 3


def test_settings_are_the_models_own_unless_given(demo):
    assert demo.generation["temperature"] > 0
    found = Conversation(demo).sampling
    assert (found.temperature, found.top_p) == (demo.generation["temperature"], demo.generation["top_p"])
    demo.generation["system"] = "Speak verse."
    assert "Speak verse." in said_to(demo, None)
    assert "Speak verse." not in said_to(demo, "")
    assert "Be brief." in said_to(demo, "Be brief.")
    assert "Speak verse." not in said_to(demo, "Be brief.")


def said_to(model: npllama.Model, system: str | None) -> str:
    conversation = Conversation(model, system, max_tokens=1)
    conversation.say("x")
    return model.tokenizer.decode(conversation.last.prompt_tokens)


def test_it_is_saved_and_goes_on_where_it_was(demo, conversation, tmp_path):
    conversation.say("Wer bist du, schöner Geist \U0001f47b?")
    conversation.save(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text(encoding="utf-8")) == conversation.messages
    loaded = Conversation.load(demo, tmp_path / "saved.json", sampling=Sampling(), max_tokens=6)
    assert loaded.messages == conversation.messages
    assert loaded.say("And I?") == conversation.say("And I?")
    loaded.reset()
    assert loaded.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", r"saved\.json is not JSON"),
        ('{"role": "user"}', r"saved\.json holds \{'role': 'user'\}, expected a list of messages with role and content"),
        ('[], "more": 1', r"saved\.json holds None, expected a list"),
        ('["Hello"]', r"saved\.json holds the message 'Hello', expected"),
        ('[{"role": "user", "content": 5}]', r"saved\.json holds the message \{'content': 5, 'role': 'user'\}, expected"),
        ('[{"role": "user", "content": "a"}]', r"saved\.json: message 1 is from 'user', expected 'assistant'"),
        ("[" * 5000, r"saved\.json is not JSON"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(demo, tmp_path, text, line):
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(npllama.ConversationError, match=line):
        Conversation.load(demo, tmp_path / "saved.json")


def test_what_the_format_refuses_is_refused_at_once(demo, tiny_sentencepiece):
    with pytest.raises(ValueError, match="found a system prompt and messages with another"):
        Conversation(demo, "a", [{"role": "system", "content": "b"}])
    with pytest.raises(ValueError, match="max_tokens is -1"):
        Conversation(demo, max_tokens=-1)
    demo.tokenizer = tiny_sentencepiece
    with pytest.raises(ValueError, match=r"a system message holds \[INST\]"):
        Conversation(demo, "[INST]", format=ChatFormat("llama2", tiny_sentencepiece))


def test_logits_that_are_nan_are_said(demo, conversation):
    conversation.say("Who art thou?")
    demo.params["norm.weight"] = np.full_like(demo.params["norm.weight"], np.nan)
    with pytest.raises(ValueError, match=r"new token 1: of 2,256 logits 2,256 are NaN"):
        conversation.say("And I?")
