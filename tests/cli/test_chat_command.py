"""npllama chat in a pipe, and how it chooses the prompt format."""

from __future__ import annotations

import io
import json

import npllama
from npllama.cli import main

from commands import fails, run


def test_chat_answers_a_line_each_and_keeps_the_conversation():
    done = run("chat", "--temperature", "0", "-n", "8", "--system", "Be brief.", input="Who art thou?\n\nAnd I?\n")
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 2  # two answers: an empty line asks nothing
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
