"""Test npllama chat at a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

import npllama
from npllama import Conversation
from npllama.cli import chat_loop
from npllama.cli.chat_loop import Loop

from system import full_disk, hear_signals, needs_proc, workers_of

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
termios = pytest.importorskip("termios", reason="this system has no pseudo-terminals")


@pytest.fixture
def loop() -> Loop:
    return Loop(Conversation(npllama.load(), "Be brief.", sampling=npllama.Sampling(), max_tokens=6))


@pytest.mark.parametrize("as_json", [False, True])
def test_an_answer_and_its_line_break_are_written_before_the_next_question_is_read(loop, as_json, monkeypatch):
    """Hold output back until it is flushed, as a pipe does: a program at the other end waits for the line."""
    written, questions = io.BytesIO(), ["Who art thou?\n", "And thou?\n", ""]
    asked = []

    class Input:
        def readline(self) -> str:
            asked.append(written.getvalue().decode())
            return questions[len(asked) - 1]

    monkeypatch.setattr("sys.stdin", Input())
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="utf-8"))
    loop.json = as_json
    chat_loop.in_a_pipe(loop)
    assert asked[0] == ""
    assert len(asked[1]) > 1
    assert asked[1].endswith("\n")
    assert asked[2].endswith("\n")
    assert len(asked[2]) > len(asked[1])


# -------------------------------------------------------------------------------------------------------------- at a terminal


class Terminal:
    """npllama chat in a pseudo-terminal."""

    def __init__(self, *args: str):
        self.ours, theirs = pty.openpty()
        self.attributes = termios.tcgetattr(theirs)  # as they are to be at the end
        self.process = subprocess.Popen(
            [sys.executable, "-m", "npllama", "chat", "--temperature", "0", *args],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "dumb"},
            preexec_fn=hear_signals,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Read the output up to and including the pattern, and return it."""
        end = time.monotonic() + seconds
        os.set_blocking(self.ours, False)
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown!r}"
            with contextlib.suppress(BlockingIOError):
                try:
                    self.shown += os.read(self.ours, 65536).decode(errors="replace")
                    self.shown = re.sub(r"\x1b\[\?2004[hl]|\r", "", self.shown)  # bracketed paste, on and off
                except OSError as error:  # Linux raises this when the other side has closed
                    if isinstance(error, BlockingIOError):
                        raise
                    assert re.search(pattern, self.shown), f"ended without {pattern!r}: {self.shown!r}"
            time.sleep(0.01)
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def close(self) -> int:
        self.type("\x04")
        status = self.process.wait(60)
        return status


def test_save_on_a_full_disk_keeps_the_last(loop, tmp_path):
    file = tmp_path / "saved.json"
    chat_loop.obey("save", str(file), loop)
    before = file.read_bytes()
    loop.conversation.messages.append({"role": "user", "content": "word " * 500})
    with full_disk(1000), pytest.raises(ValueError, match=r"saved\.json: File too large"):
        chat_loop.obey("save", str(file), loop)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_a_path_that_leads_nowhere_is_an_error_and_not_the_end(loop, tmp_path):
    """Refuse an unknown user's home, and links in a circle: pathlib's RuntimeError ended the chat, and the conversation."""
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in ("~nobody-of-this-name/saved.json", tmp_path / "circle" / "saved.json", "a\0b"):
        with pytest.raises((ValueError, OSError), match=r"No such file or directory|symbolic links|null"):
            chat_loop.obey("save", str(path), loop)


def test_an_interrupted_answer_is_kept(loop, monkeypatch, capsys):
    def impatient(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_loop, "write", impatient)
    with pytest.raises(KeyboardInterrupt):
        chat_loop.answer(loop, "Who art thou?")
    assert [message["role"] for message in loop.conversation.messages] == ["system", "user", "assistant"]
    assert loop.conversation.messages[-1]["content"]
    assert "cut at" not in capsys.readouterr().err


@pytest.fixture
def open_terminal() -> Iterator[type[Terminal]]:
    opened: list[Terminal] = []

    def make(*args: str) -> Terminal:
        opened.append(Terminal(*args))
        opened[-1].until("> ")
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.ours)


def test_a_conversation_at_a_terminal(open_terminal, tmp_path):
    terminal = open_terminal("-n", "5", "--system", "Be brief.")
    terminal.type("/help\n")
    assert "/save FILE" in terminal.until("\n> ")
    terminal.type("Who art thou?\n")
    assert "tokens/s" in terminal.until("\n> ")
    terminal.type("one\\\ntwo\n")
    terminal.until("\n> ")
    terminal.type('"""three\n\n  four\\\n"""\n')
    terminal.until("\n> ")
    file = tmp_path / "saved.json"
    terminal.type(f"/save {file}\n")
    terminal.until("7 messages.*\n> ")
    messages = json.loads(file.read_text())
    typed = [message["content"] for message in messages if message["role"] != "assistant"]
    assert typed == ["Be brief.", "Who art thou?", "one\ntwo", "three\n\n  four\\"]
    terminal.type("/reset\n")
    terminal.until("forgotten.*\n> ")
    terminal.type(f"/save {file}\n")  # its own file may be written again
    terminal.until("1 messages.*\n> ")
    terminal.type("/nonsense\n")
    terminal.until("unknown command /nonsense.*\n> ")
    (tmp_path / "other").write_text("mine")
    terminal.type(f"/save {tmp_path / 'other'}\n")
    terminal.until("other exists.*\n> ")
    assert (tmp_path / "other").read_text() == "mine"
    terminal.type(f"/save {tmp_path}/no/where\n")
    terminal.until("No such file.*\n> ")
    assert terminal.close() == 0


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_a_command_ends_the_chat(open_terminal, command):
    terminal = open_terminal()
    terminal.type(f"{command}\n")
    assert terminal.process.wait(60) == 0


def test_a_bad_message_is_said_and_dropped(open_terminal):
    terminal = open_terminal("-n", "5")
    terminal.type('"""' + "\n".join(["word " * 100] * 6) + '"""\n')
    assert "Traceback" not in terminal.until("the model's context holds 512.*\n> ")
    terminal.type("Who art thou?\n")
    assert "tokens/s" in terminal.until("\n> ")
    assert terminal.close() == 0


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_stops_the_answer_and_not_the_program(open_terminal, processes):
    terminal = open_terminal("-n", "450", "--temperature", "1.9", "--top-p", "1", "--processes", processes)
    terminal.type("Who art thou?\n")
    terminal.until("thou\\?\n.+")
    terminal.process.send_signal(signal.SIGINT)
    assert "Traceback" not in terminal.until("stopped.*\n> ")
    terminal.type("half a line")
    time.sleep(0.3)
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\n> ")
    terminal.type("/help\n")
    terminal.until("/save FILE(.|\n)*\n> ")
    assert terminal.close() == 0


@needs_proc
def test_a_rank_that_is_lost_while_a_line_is_typed(open_terminal, tmp_path):
    """Kill a rank while the chat waits: it says so, keeps what was typed, answers no more, saves, and restores the terminal."""
    terminal = open_terminal("-n", "2", "--processes", "2")
    terminal.type("Who art thou?\n")
    terminal.until("tokens/s.*\n> ")
    terminal.type('"""two\nli')
    terminal.until(r"\. li")
    [worker] = workers_of(terminal.process.pid)
    os.kill(worker, signal.SIGKILL)
    lost = rf"\[rank 1 of 2 \(process {worker}\) was ended by SIGKILL; no more answers, but /save FILE and /exit\]\n"
    terminal.until(rf"\n{lost}\. li$")
    terminal.type('nes"""\n')
    assert terminal.until(f"{lost}> $").startswith('nes"""\n')
    saved = tmp_path / "saved.json"
    terminal.type(f"/save {saved}\n")
    terminal.until("messages.*\n> ")
    assert {"role": "user", "content": "Who art thou?"} in json.loads(saved.read_text())
    terminal.type("/exit\n")
    assert terminal.process.wait(60) == 0
    assert termios.tcgetattr(terminal.ours) == terminal.attributes


def test_the_arrow_brings_the_last_message_back(open_terminal):
    pytest.importorskip("readline", reason="this Python has no readline")
    terminal = open_terminal("-n", "2")
    terminal.type("Who art thou?\n")
    terminal.until("tokens/s.*\n> ")
    terminal.type("\x10\n")  # Ctrl-P, as the arrow up
    assert "Who art thou?" in terminal.until("tokens/s.*\n> ")
    assert terminal.close() == 0
