"""Conversation: a chat with a model, whose cache is kept between turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ..cache import KVCache
from ..chat import ChatFormat, chat_format
from ..checkpoint import Model
from ..checkpoint.atomic import write_file
from ..checkpoint.foreign import JSON_LIMIT, parse_json, read_bytes
from ..errors import NpllamaError, shown
from ..generation import Step, check_counts, generate_steps
from ..sampling import Sampling
from .completion import Completion, Continuation, Stream

Message = Mapping[str, str]


class ConversationError(NpllamaError):
    """A conversation's file or a turn is invalid; the message is one line."""


class Conversation:
    """The messages so far, each with `role` and `content`, and the key/value cache of their tokens.

    system       the system prompt; None: the model's own, if it has one; "": none
    messages     an earlier conversation to continue, which may begin with a system message
    format       a ChatFormat, or the name of one: of chat.FORMATS or of the model's templates; by default the model's own
    sampling     by default the settings recommended with the model, else greedy
    max_tokens   most tokens of an answer
    logprobs     as in complete(), for `last`

    `last` is the Completion of the last answer, and `n_read` the number of tokens that its prefill computed. Raises ValueError
    for a model without a chat format, and for messages that the format refuses.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        messages: Sequence[Message] = (),
        *,
        format: str | ChatFormat | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 512,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ):
        check_counts(max_tokens, seed)
        self.model, self.max_tokens, self.seed, self.logprobs = model, max_tokens, seed, logprobs
        self.sampling = recommended_sampling(model) if sampling is None else sampling
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        self.format = format if isinstance(format, ChatFormat) else chat_format(model, format)
        if system is not None:
            self.format = replace(self.format, system=None)
        self.messages = [dict(message) for message in messages]
        if system and any(message.get("role") == "system" for message in messages):
            raise ConversationError("found a system prompt and messages with another, expected one of them")
        if system:
            self.messages.insert(0, {"role": "system", "content": system})
        self.last: Completion | None = None
        self.n_read = 0
        self._cache = KVCache(model.config)
        self._held: list[int] = []  # the ids that the cache holds
        self._answer: Stream | None = None
        self._ids("")

    @classmethod
    def load(
        cls,
        model: Model,
        path: str | Path,
        *,
        format: str | ChatFormat | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = 512,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Conversation:
        """Continue a conversation that save() has written. Raises ConversationError for a file that isn't one."""
        messages = read_messages(Path(path))
        try:
            return cls(
                model,
                None,
                messages,
                format=format,
                sampling=sampling,
                max_tokens=max_tokens,
                seed=seed,
                stop=stop,
                logprobs=logprobs,
            )
        except ValueError as error:
            raise ConversationError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, a list of objects with role and content; an existing file is replaced."""
        write_file(path, (json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "surrogatepass"))

    def say(self, text: str) -> str:
        """Return the answer. Raises ValueError as stream() does."""
        return "".join(self.stream(text))

    def stream(self, text: str, watch: Callable[[Iterator[Step]], Iterator[Step]] | None = None) -> Stream:
        """Return the answer piece by piece; only tokens that aren't in the cache are computed.

        `watch` wraps the iterator of generated tokens, to measure times for example. When the stream ends, is interrupted or
        closed, the question and the answer so far are added to `messages`. Raises ValueError for a question that the format
        refuses or that doesn't fit the context; the conversation stays unchanged then.
        """
        if self._answer:
            self._answer.close()
        ids = self._ids(text)
        if len(ids) > (room := self.model.config.max_seq_len):
            found = f"the conversation has {len(ids):,} tokens, the model's context holds {room:,}"
            raise ConversationError(f"{found}: reset() starts a new one")
        # The last token is always computed, as its logits give the first token of the answer.
        shared = _common_prefix(ids[:-1], self._held)
        self._cache.truncate(shared)
        self._held, self.n_read = ids[:shared], len(ids) - shared
        answer = Continuation(self.model, ids, self.max_tokens, self.stop, self.logprobs)
        self.last = done = answer.completion
        messages = [*self.messages, {"role": "user", "content": text}]

        def keep() -> None:
            self._held = (ids + done.tokens)[: self._cache.length]
            self.messages = [*messages, {"role": "assistant", "content": done.text}]

        steps = generate_steps(
            self.model, ids[shared:], self.max_tokens, self.sampling, self.seed, cache=self._cache, before=ids[:shared]
        )
        self._answer = Stream(answer, watch(steps) if watch else steps, keep)
        return self._answer

    def reset(self) -> None:
        """Forget all messages but the system prompt, whose part of the cache is reused."""
        if self._answer:
            self._answer.close()
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _ids(self, question: str) -> list[int]:
        return self.format.prompt([*self.messages, {"role": "user", "content": question}]).ids


def recommended_sampling(model: Model) -> Sampling:
    """Return the sampling settings recommended with a model, else greedy ones."""
    given = {name: value for name in asdict(Sampling()) if isinstance(value := model.generation.get(name), int | float)}
    return Sampling(**given)  # type: ignore[arg-type]  # top_k, which no model directory has, is whole


def read_messages(path: Path) -> list[dict[str, str]]:
    """Read a conversation's file: a JSON list of objects with role and content. Raises ConversationError for any other."""
    data = read_bytes(path, JSON_LIMIT, ConversationError)
    expected = "expected a list of messages with role and content, as save() writes them"
    try:
        found = parse_json(b'{"messages": ' + data + b"}")  # one reader of JSON, with limits, and it reads objects
    except ValueError as error:
        raise ConversationError(f"{path} is not JSON: {error}") from None
    messages = found["messages"] if found.keys() == {"messages"} else None
    if not isinstance(messages, list):
        raise ConversationError(f"{path} holds {shown(messages)}, {expected}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConversationError(f"{path} holds the message {shown(message)}, {expected}")
    return messages


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
