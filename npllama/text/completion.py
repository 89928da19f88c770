"""Text in, text out: complete() for one prompt or several, whole or as a stream."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, overload

import numpy as np

from ..cache import KVCache
from ..checkpoint import Model
from ..generation import Step, TextStream, check_counts, check_prompt, check_room, generate_steps, stop_ids_of
from ..sampling import LogitsError, Sampling
from ..tokenizer import StreamDecoder, Tokenizer
from .batching import Batch

if TYPE_CHECKING:
    from typing_extensions import Unpack

FinishReason: TypeAlias = Literal["stop", "length", "context"]
Prompt: TypeAlias = "str | Sequence[int] | np.ndarray"

ROWS = 8  # prompts that are computed together


@dataclass(frozen=True)
class TokenLogprobs:
    """A generated token's log-probability and the likeliest alternatives, before temperature and the other settings."""

    token: int
    piece: str  # as Tokenizer.piece() shows it; empty without a tokenizer
    logprob: float  # natural logarithm
    top: list[tuple[int, str, float]]  # id, piece, log-probability; the likeliest first

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, step: Step, k: int) -> TokenLogprobs:
        """Return the entry of a step's token, with the k likeliest tokens of that step."""

        def piece(id: int) -> str:
            return tokenizer.piece(id) if tokenizer else ""

        return cls(step.token, piece(step.token), step.logprob, [(id, piece(id), logprob) for id, logprob in step.top(k)])


def in_json(logprob: float) -> float | None:
    """Return a log-probability as JSON can hold it: None if it is infinite, as of a token that is ruled out, or NaN."""
    return logprob if math.isfinite(logprob) else None


@dataclass
class Completion:
    """The continuation of a prompt.

    text           ends before the first stop string; empty without a tokenizer
    tokens         all generated ids, those that spell the stop string included; a stop id is not among them
    finish_reason  "stop" at a stop string or a stop id, "length" after max_tokens, "context" where the context is full; None
                   while it is being generated, or if it was interrupted
    logprobs       an entry for each of `tokens`, if requested
    prompt_tokens  the prompt's ids
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_tokens: list[int] = field(default_factory=list)


class Continuation:
    """Build a Completion from tokens, one at a time.

    n_before  tokens that the cache held before the prompt
    """

    def __init__(
        self,
        model: Model,
        prompt_tokens: Sequence[int],
        max_tokens: int,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        stop_ids: Iterable[int] | None = None,
        n_before: int = 0,
    ):
        tokenizer = model.tokenizer
        if stop and tokenizer is None:
            raise ValueError(f"{model.path} has no tokenizer, so stop strings can't be used")
        if isinstance(stop, str) or "" in stop:
            raise ValueError(f"the stop strings are {stop!r:.60}, expected a list of texts that are not empty")
        if logprobs is not None and logprobs < 0:
            raise ValueError(f"logprobs is {logprobs}, expected 0 or more")
        self.completion = Completion(logprobs=None if logprobs is None else [], prompt_tokens=list(prompt_tokens))
        self._tokenizer, self._max_tokens, self._k = tokenizer, max_tokens, logprobs
        self._stop_ids = stop_ids_of(model, stop_ids)
        self._room = model.config.max_seq_len + 1 - len(prompt_tokens) - n_before  # the last token is never an input
        self._stream = TextStream(StreamDecoder(tokenizer, prompt_tokens), stop) if tokenizer else None

    @property
    def ended(self) -> bool:
        """Return whether the completion has a finish reason."""
        return self.completion.finish_reason is not None

    def push(self, step: Step) -> str:
        """Add the next token, and return the new text that no later token can change."""
        done = self.completion
        if step.token in self._stop_ids:
            return self.end("stop")
        done.tokens.append(step.token)
        if done.logprobs is not None:
            done.logprobs.append(TokenLogprobs.of(self._tokenizer, step, self._k or 0))
        text = self._stream.push(step.token) if self._stream else ""
        done.text += text
        if self._stream and self._stream.ended:
            return text + self.end("stop")
        if len(done.tokens) == self._max_tokens:
            return text + self.end("length")
        if len(done.tokens) == self._room:
            return text + self.end("context")
        return text

    def end(self, reason: FinishReason | None = None) -> str:
        """End the text, unless it has ended, and return what was held back. Without a reason: no token followed."""
        if self.ended:
            return ""
        reason = reason or ("stop" if self._max_tokens else "length")
        text = self._stream.flush() if self._stream else ""
        self.completion.text += text
        stopped = self._stream is not None and self._stream.ended
        self.completion.finish_reason = "stop" if stopped else reason
        return text


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; `completion` holds the text so far.

    `after` is called once when the stream ends, is interrupted or closed; never if the stream wasn't started.
    """

    def __init__(self, continuation: Continuation, steps: Iterator[Step], after: Callable[[], object] | None = None):
        self.completion = continuation.completion
        self._pieces = _pieces(continuation, steps, after)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()


def _pieces(
    continuation: Continuation, steps: Iterator[Step], after: Callable[[], object] | None
) -> Generator[str, None, None]:
    try:
        for step in steps:
            if text := continuation.push(step):
                yield text
            if continuation.ended:
                return
        if text := continuation.end():
            yield text
    finally:
        if after:
            after()


class _Options(TypedDict, total=False):
    """Keyword arguments of complete(), for the type checker."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]
    logprobs: int | None
    stop_ids: Iterable[int] | None
    special: bool
    lookup: int


@overload
def complete(  # type: ignore[overload-overlap]  # a str is an iterable of str too: the first matching overload applies
    model: Model,
    prompt: Prompt,
    *,
    stream: Literal[False] = False,
    **options: Unpack[_Options],
) -> Completion: ...
@overload
def complete(model: Model, prompt: Prompt, *, stream: Literal[True], **options: Unpack[_Options]) -> Stream: ...
@overload
def complete(
    model: Model, prompt: Iterable[Prompt], *, stream: Literal[False] = False, **options: Unpack[_Options]
) -> list[Completion]: ...
def complete(
    model: Model,
    prompt: Prompt | Iterable[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    logprobs: int | None = None,
    stop_ids: Iterable[int] | None = None,
    special: bool = False,
    lookup: int = 0,
    stream: bool = False,
) -> Completion | list[Completion] | Stream:
    """Continue a text, or token ids; several prompts are computed together and give a list.

    max_tokens   most tokens to generate
    temperature  0 takes the likeliest token; this, top_k, top_p, min_p and repetition_penalty as in Sampling
    seed         the same seed gives the same text
    stop         strings; the text ends before the first of them
    logprobs     for each token, its log-probability and those of the `logprobs` likeliest tokens; None: none
    stop_ids     ids that end the text; by default the tokenizer's
    special      parse the spelling of special tokens in the prompt as these tokens
    lookup       prompt-lookup decoding: verify up to so many proposed tokens per pass (one prompt, temperature 0)
    stream       return a Stream of the text's pieces, which never break a character

    A text is encoded with a BOS token first; for chat models use Conversation, which applies the chat template. Raises
    ValueError for a prompt that is empty or longer than the context, text without a tokenizer, and settings out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_counts(max_tokens, seed)
    one, prompts = _prompts(prompt)
    ids = [_ids(model, given, special) for given in prompts]
    stop = [stop] if isinstance(stop, str) else list(stop)
    ending = None if stop_ids is None else list(stop_ids)
    texts = [Continuation(model, row, max_tokens, stop, logprobs, ending) for row in ids]
    if not one and (stream or lookup):
        raise ValueError(f"{'stream' if stream else 'lookup'} takes one prompt, found {len(ids)}")
    if not one:
        if max_tokens:
            _complete_together(model, texts, sampling, seed)
        for text in texts:
            text.end()
        return [text.completion for text in texts]
    steps = generate_steps(model, ids[0], max_tokens, sampling, seed, ending, lookup=lookup)
    pieces = Stream(texts[0], steps)
    if stream:
        return pieces
    deque(pieces, maxlen=0)
    return pieces.completion


def _prompts(prompt: Prompt | Iterable[Prompt]) -> tuple[bool, list[Prompt]]:
    """Return whether one prompt was given, and a list of all prompts."""
    if isinstance(prompt, str):
        return True, [prompt]
    given: list = list(prompt)
    if not given:
        raise ValueError("there is no prompt, expected text, token ids, or several of them")
    if isinstance(given[0], int | np.integer):
        return True, [given]
    return False, given


def _ids(model: Model, prompt: Prompt, special: bool) -> list[int]:
    """Return the ids of a prompt, checked."""
    if isinstance(prompt, str):
        ids = required(model).encode(prompt, bos=True, special=special)
        if not ids:
            raise ValueError("the prompt is empty, and this model has no BOS token to start from")
    else:
        ids = check_prompt(prompt, model).tolist()
    check_room(np.array(ids), KVCache(model.config))
    return ids


def required(model: Model) -> Tokenizer:
    """Return the model's tokenizer. Raises ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer: found text, expected token ids")
    return model.tokenizer


def _complete_together(model: Model, texts: Sequence[Continuation], sampling: Sampling, seed: int) -> None:
    """Continue all texts; when one ends, the next takes its row. Text i samples with the seed (seed, i)."""
    batch = Batch(model, min(ROWS, len(texts)))
    rows: dict[int, Continuation] = {}
    waiting = deque(enumerate(texts))
    while waiting or rows:
        while waiting and batch.free:
            i, text = waiting.popleft()
            rows[batch.join(text.completion.prompt_tokens, sampling, [seed, i])] = text
        for row, step in batch.advance():
            if isinstance(step, LogitsError):
                raise step
            rows[row].push(step)
            if rows[row].ended:
                batch.leave(row)
                del rows[row]
