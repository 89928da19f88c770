"""The loops of `npllama chat`, at a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.ranks.groups import RankLost
from ..text.conversation import Conversation
from .console import Statistics, as_json, say_if_cut, watched_ranks, write

COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)  # "/usr/bin" is no command
COMMANDS = """\
/reset      forget the conversation, keep the system prompt
/save FILE  write the conversation as JSON: a list of objects with role and content
/help       list the commands
/exit       end the chat, as Ctrl-D does"""
HELP = f'''\
A message is one line. A backslash at its end continues it on the next line;
between """ and """ a message may have any number of lines.
{COMMANDS}
Ctrl-C stops the answer, Ctrl-D ends the chat. To begin a message with /, type
a space before it.'''


@dataclass
class Loop:
    """A conversation, and the form in which answers are printed."""

    conversation: Conversation
    json: bool = False
    saved: set[Path] = field(default_factory=set)  # files that /save may replace
    lost: bool = False  # whether a rank is lost, after which no answer is possible


def in_a_pipe(loop: Loop) -> None:
    """Answer each line of standard input that isn't empty, and execute commands; an error or a lost rank ends the chat."""
    while line := next_line(loop):
        if command := COMMAND.fullmatch(line.rstrip()):
            try:
                obey(command[1], command[2], loop)
            except EOFError:
                return
        elif line.strip():
            answer(loop, line.rstrip("\n"))


def next_line(loop: Loop) -> str:
    """Return the next line of standard input, "" at its end. Raises RankLost if a rank ends during the wait."""
    write("")  # flushes the answer's line break, for which a program at the other end may wait
    with watched_ranks(loop.conversation.model.params):
        return sys.stdin.readline()


def answer(loop: Loop, question: str) -> None:
    """Print an answer as it is generated, or as JSON; then, on standard error, whether it was cut and the timings."""
    statistics = Statistics(0)
    stream = loop.conversation.stream(question, statistics.watch)
    statistics.n_prompt, done = loop.conversation.n_read, stream.completion
    try:
        for text in stream:
            if not loop.json:
                write(text)
        if loop.json:
            write(as_json(done, statistics.timings()))
    finally:
        stream.close()  # an interrupted answer stays in the conversation
        print()
        say_if_cut(done.finish_reason, len(done.tokens))
        statistics.print()


# -------------------------------------------------------------------------------------------------------------- at a terminal


def at_a_terminal(loop: Loop) -> None:
    """Chat until Ctrl-D, with line editing, history, commands and messages of several lines; an error doesn't end the chat."""
    with contextlib.suppress(ImportError):  # where the system has it
        import readline

        if "libedit" not in (readline.__doc__ or ""):  # pasted text is one message, even if it has several lines
            readline.parse_and_bind("set enable-bracketed-paste on")
    report("/help lists the commands, Ctrl-D ends the chat")
    while True:
        try:
            message = typed(loop)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if command := COMMAND.fullmatch(message.rstrip()):
                obey(command[1], command[2], loop)
            elif message.strip():
                answer(loop, message)
        except EOFError:
            return
        except KeyboardInterrupt:
            report("stopped")
        except RankLost as error:
            lose(loop, error)
        except (ValueError, OSError) as error:
            report(" ".join(str(error).split()))


def lose(loop: Loop, error: RankLost) -> None:
    """Report that a rank is lost. The chat goes on, so that the conversation can be saved."""
    loop.lost = True
    report(f"{error}; no more answers, but /save FILE and /exit")


def typed(loop: Loop) -> str:
    """Read one message: a line, which a backslash at its end continues, or all lines between two \"\"\"."""
    line = typed_line("> ", loop)
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(typed_line(". ", loop))
        return "\n".join(lines)[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + typed_line(". ", loop)
    return line


def typed_line(prompt: str, loop: Loop) -> str:
    """Read one line. If a rank is lost meanwhile, report it, then go on with the line as far as it was typed."""
    try:
        with watched_ranks(None if loop.lost else loop.conversation.model.params):
            return input(prompt)
    except RankLost as error:
        if readline := sys.modules.get("readline"):  # else the terminal keeps the line
            begun = readline.get_line_buffer()
            readline.set_startup_hook(lambda: readline.insert_text(begun))
        print(file=sys.stderr)
        lose(loop, error)
        try:
            return input(prompt)
        finally:
            if readline:
                readline.set_startup_hook(None)


def obey(command: str, argument: str | None, loop: Loop) -> None:
    """Execute a command. Raises ValueError or OSError if it fails, and EOFError for /exit."""
    if command == "save" and argument:
        path = absolute(argument)
        if path.exists() and path not in loop.saved:
            raise ValueError(f"{path} exists: choose another name")
        loop.conversation.save(path)
        loop.saved.add(path)
        report(f"{path}: {len(loop.conversation.messages)} messages")
    elif command == "reset" and not argument:
        loop.conversation.reset()
        report("the conversation is forgotten")
    elif command in ("exit", "quit") and not argument:
        raise EOFError
    elif command == "help" and not argument:
        print(HELP, file=sys.stderr)
    else:
        raise ValueError(f"unknown command /{command}: expected /help, /reset, /save FILE or /exit")


def absolute(path: str) -> Path:
    """Resolve `~` and links. An unknown user or a circle of links stays in the path, where pathlib raises RuntimeError."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def report(line: str) -> None:
    """Print a line on standard error, in brackets: it isn't part of the conversation."""
    print(f"[{line}]", file=sys.stderr, flush=True)
