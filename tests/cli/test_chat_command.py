"""Test npllama chat in a pipe, and its choice of the chat format."""

from __future__ import annotations

import io
import json

import pytest

import npllama
from npllama.cli import main

from commands import fails, run


def test_chat_answers_a_line_each_and_keeps_the_conversation():
    done = run("chat", "--temperature", "0", "-n", "8", "--system", "Be brief.", input="Who art thou?\n\nAnd I?\n")
    assert done.returncode == 0
    first, *others = done.stderr.splitlines()
    assert "follows no instructions" in first
    assert [line.split()[0] for line in others] == ["[cut", "prefill"] * 2  # two answers: an empty line is no question
    model = npllama.load()
    tokenizer = model.tokenizer
    messages = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for question in ("Who art thou?", "And I?"):
        messages.append({"role": "user", "content": question})
        ids = npllama.chat.encode_llama3(tokenizer, messages)
        answer = tokenizer.decode(list(npllama.generate(model, ids, max_tokens=8)))
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert done.stdout == expected


def set_chat_format(path, name):
    values = json.loads((path / "config.json").read_text())
    values["generation"]["chat_format"] = name
    (path / "config.json").write_text(json.dumps(values))


def test_without_a_template_the_format_is_asked_for(copy_of_demo, capsys, monkeypatch):
    set_chat_format(copy_of_demo, None)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    error = fails(capsys, "chat", "-m", copy_of_demo)
    assert "has no chat template of its own: expected --format with one of llama3, llama2, chatml, mistral, zephyr" in error
    assert "(its tokenizer has the special tokens of llama3)" in error
    assert main(["chat", "-m", str(copy_of_demo), "--format", "llama3"]) == 0
    assert capsys.readouterr().err == ""


def test_a_chat_format_that_is_none_is_refused(copy_of_demo, capsys):
    set_chat_format(copy_of_demo, "telex")
    assert "config.json: chat_format is 'telex', expected llama3, llama2" in fails(capsys, "chat", "-m", copy_of_demo)


def test_one_question_is_answered_and_no_input_is_read(copy_of_demo):
    done = run("chat", "Who art thou?", "-m", copy_of_demo, "--temperature", "0", "-n", "6", input="And I?\n")
    expected = npllama.Conversation(npllama.load(), sampling=npllama.Sampling(), max_tokens=6)
    assert done.stdout == expected.say("Who art thou?") + "\n"
    assert done.stderr.splitlines()[0] == "[cut at 6 tokens: -n]"
    asked = run("chat", "-", "-m", copy_of_demo, "--temperature", "0", "-n", "6", input="Who\nart thou?")
    expected.reset()
    assert asked.stdout == expected.say("Who\nart thou?") + "\n"


def test_json_is_an_object_for_each_answer(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who art thou?\nAnd I?\n"))
    assert main(["chat", "--json", "--temperature", "0", "-n", "6"]) == 0
    conversation = npllama.Conversation(npllama.load(), sampling=npllama.Sampling(), max_tokens=6)
    for line, question in zip(capsys.readouterr().out.splitlines(), ("Who art thou?", "And I?"), strict=True):
        found = json.loads(line)
        assert found["text"] == conversation.say(question)
        assert (found["tokens"], found["finish_reason"]) == (conversation.last.tokens, "length")
        assert found["prompt_tokens"] == conversation.last.prompt_tokens
        assert found["timings"]["prefill_tokens"] == conversation.n_read
        assert len(found["logprobs"]) == 6


def test_commands_in_a_pipe_are_obeyed_or_refused(tmp_path, capsys, monkeypatch):
    saved = tmp_path / "saved.json"
    lines = ["Who art thou?", f"/save {saved}", "/reset", " /reset", f"/save {saved}", "/help", "/exit", "Never asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "-n", "3"]) == 0
    out, err = capsys.readouterr()
    assert "/save FILE" in err
    assert "/save" not in out
    assert [m["content"] for m in json.loads(saved.read_text())][::2] == [" /reset"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/nonsense\nNever asked\n"))
    assert main(["chat", "-n", "3"]) == 2
    out, err = capsys.readouterr()
    assert "unknown command /nonsense: expected /help, /reset, /save FILE or /exit" in err
    assert out == ""


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n/{name}" in out for name in ("reset", "save FILE", "help", "exit"))


def test_a_saved_conversation_is_loaded_and_saved_again(tmp_path, capsys, monkeypatch):
    conversation = npllama.Conversation(npllama.load(), "Be brief.", sampling=npllama.Sampling(), max_tokens=6)
    conversation.say("Who art thou?")
    conversation.save(tmp_path / "saved.json")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"And I?\n/save {tmp_path / 'saved.json'}\n"))
    assert main(["chat", "--load", str(tmp_path / "saved.json"), "--temperature", "0", "-n", "6"]) == 0
    assert capsys.readouterr().out == conversation.say("And I?") + "\n"
    assert json.loads((tmp_path / "saved.json").read_text()) == conversation.messages
    assert "expected one of them" in fails(capsys, "chat", "x", "--load", tmp_path / "saved.json", "--system", "x")
    assert "none.json" in fails(capsys, "chat", "x", "--load", tmp_path / "none.json")


def test_a_full_context_is_said(copy_of_demo):
    values = json.loads((copy_of_demo / "config.json").read_text())
    (copy_of_demo / "config.json").write_text(json.dumps(values | {"max_seq_len": 24}))
    done = run("chat", "Who art thou?", "-m", copy_of_demo, "--temperature", "0")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "[context full]"
