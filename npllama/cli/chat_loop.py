"""The conversation of `npllama chat`, whose cache is kept from turn to turn, and its loops at a terminal and in a pipe."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..cache import KVCache
from ..chat import ChatFormat
from ..checkpoint import Model
from ..checkpoint.atomic import write_file
from ..generation import Step, generate_steps, stream_text
from ..sampling import Sampling
from ..tokenizer import StreamDecoder
from .console import Statistics, write
from .options import required_tokenizer

COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)  # "/usr/bin" is no command
HELP = '''\
A message is a line. A backslash at its end continues it on the next one;
between """ and """ a message may have any number of lines.
/reset      forget the conversation, keep the system prompt
/save FILE  write the conversation as JSON: a list of role and content
/help       this text
/exit       end the chat, as Ctrl-D does
Ctrl-C stops the answer, Ctrl-D ends the chat. A space before the / makes it
part of a message.'''


class Conversation:
    """The messages so far and the cache of those computed. Raises ValueError for a system prompt the format refuses."""

    def __init__(
        self,
        model: Model,
        format: ChatFormat,
        system: str | None,
        sampling: Sampling,
        max_tokens: int,
        seed: int = 0,
        stop: Sequence[str] = (),
    ):
        self.model, self.format, self.sampling = model, format, sampling
        self.tokenizer = required_tokenizer(model)
        self.max_tokens, self.seed, self.stop = max_tokens, seed, stop
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.system)
        self.cache = KVCache(model.config)
        self.held: list[int] = []  # the ids that the cache holds
        self.statistics: Statistics | None = None  # of the last question
        format.prompt([*self.system, {"role": "user", "content": ""}])

    def reset(self) -> None:
        """Forget everything but the system prompt, whose part of the cache the next question finds."""
        self.messages = list(self.system)

    def ask(self, question: str, write: Callable[[str], object]) -> None:
        """Pass the answer to `write` piece by piece; only what the cache lacks is computed.

        An interrupt passes through, and the answer is kept as far as it came. A question that can't be asked (its tags, or no
        room in the context) raises ValueError and leaves the conversation as it was.
        """
        self.statistics = None
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.format.prompt(messages).ids
        shared = common_prefix(ids[:-1], self.held)  # the last one is always computed: its logits are the answer's first token
        self.cache.truncate(shared)
        self.held = ids[:shared]
        room = self.model.config.max_seq_len
        if len(ids) > room:
            raise ValueError(f"the conversation has {len(ids):,} tokens, the model's context holds {room:,}: /reset forgets it")
        steps = generate_steps(self.model, ids[shared:], self.max_tokens, self.sampling, self.seed, cache=self.cache)
        self.statistics = Statistics(len(ids) - shared)
        made: list[int] = []
        answer = ""
        try:
            for text in stream_text(_noted(self.statistics.watch(steps), made), StreamDecoder(self.tokenizer, ids), self.stop):
                answer += text
                write(text)
        finally:
            self.held = (ids + made)[: self.cache.length]
            self.messages = [*messages, {"role": "assistant", "content": answer}]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _noted(steps: Iterable[Step], made: list[int]) -> Iterator[int]:
    for step in steps:
        made.append(step.token)
        yield step.token


def in_a_pipe(conversation: Conversation) -> None:
    """Answer each line of standard input that holds any text; an error ends it."""
    for line in sys.stdin:
        if line.strip():
            answer(conversation, line.rstrip("\n"))


def answer(conversation: Conversation, question: str) -> None:
    """Print the answer as it is made, then its times on standard error."""
    try:
        conversation.ask(question, write)
    finally:
        if conversation.statistics:  # none where the question was refused
            print()
            conversation.statistics.print()


# -------------------------------------------------------------------------------------------------------------- at a terminal


def at_a_terminal(conversation: Conversation) -> None:
    """Talk until Ctrl-D: with line editing and history, commands, messages of several lines; an error doesn't end it."""
    with contextlib.suppress(ImportError):  # where the system has it
        import readline

        if "libedit" not in (readline.__doc__ or ""):  # what is pasted is one message, even if it has several lines
            readline.parse_and_bind("set enable-bracketed-paste on")
    saved: set[Path] = set()
    report("/help says what can be typed, Ctrl-D ends")
    while True:
        try:
            message = typed()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if command := COMMAND.fullmatch(message.rstrip()):
                obey(command[1], command[2], conversation, saved)
            elif message.strip():
                answer(conversation, message)
        except EOFError:
            return
        except KeyboardInterrupt:
            report("stopped")
        except (ValueError, OSError) as error:
            report(" ".join(str(error).split()))


def typed() -> str:
    """Read one message: a line, more after a backslash at its end, or what stands between two \"\"\"."""
    line = input("> ")
    if line.startswith('"""'):
        lines = [line[3:]]
        while not lines[-1].endswith('"""'):
            lines.append(input(". "))
        return "\n".join(lines)[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". ")
    return line


def obey(command: str, argument: str | None, conversation: Conversation, saved: set[Path]) -> None:
    """Do what /command says. Raises ValueError or OSError where that can't be done, EOFError at the end of the chat."""
    if command == "save" and argument:
        path = Path(argument).expanduser().resolve()
        if path.exists() and path not in saved:
            raise ValueError(f"{path} exists: choose another name")
        write_file(path, (json.dumps(conversation.messages, ensure_ascii=False, indent=2) + "\n").encode())
        saved.add(path)
        report(f"{path}: {len(conversation.messages)} messages")
    elif command == "reset" and not argument:
        conversation.reset()
        report("the conversation is forgotten")
    elif command in ("exit", "quit") and not argument:
        raise EOFError
    elif command == "help" and not argument:
        print(HELP)
    else:
        raise ValueError(f"/{command} is not understood: expected /help, /reset, /save FILE or /exit")


def report(line: str) -> None:
    """Print a line that is no part of the conversation."""
    print(f"[{line}]", file=sys.stderr, flush=True)
