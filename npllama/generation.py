"""Prefill, then decode: tokens one by one as an iterator; batches; log-probabilities; the text as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .cache import KVCache
from .checkpoint import Model
from .model import check_tokens, forward
from .sampling import LogitsError, Sampling, likeliest, log_probabilities, sample
from .tokenizer import StreamDecoder

PREFILL_CHUNK = 512  # tokens a pass: the scores of a long prompt are never in memory whole


@dataclass(frozen=True)
class Step:
    """One generated token, and the logits it was drawn from."""

    token: int
    logits: np.ndarray  # [V]

    @property
    def logprob(self) -> float:
        """Return the natural logarithm of the token's probability under the model, before sampling settings."""
        return float(log_probabilities(self.logits)[self.token])

    def top(self, k: int) -> list[tuple[int, float]]:
        """Return the k most likely tokens with their log-probabilities, the most likely first."""
        logprobs = log_probabilities(self.logits)
        return [(int(i), float(logprobs[i])) for i in likeliest(logprobs, k)]


def generate(
    model: Model,
    tokens: Sequence[int] | np.ndarray,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    cache: KVCache | None = None,
    lookup: int = 0,
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """Continue a prompt: yield ids as they are generated, at most max_tokens; complete() takes and returns text.

    Ends before a stop id (the tokenizer's, unless given) and where the context is full. The same seed gives the same tokens. A
    cache holds the tokens before `tokens`. `lookup` is prompt-lookup decoding: one pass verifies up to that many tokens,
    proposed from earlier n-grams. The tokens are the same, except for ties within rounding; repetitive texts take less time.
    Raises ValueError for a prompt that is empty, outside the vocabulary or longer than the context, for lookup with a
    temperature, and, at the step that computes them, for logits that are NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = generate_steps(model, tokens, max_tokens, sampling, seed, stop_ids, cache, lookup)
    return (step.token for step in steps)


def generate_steps(
    model: Model,
    tokens: Sequence[int] | np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
    cache: KVCache | None = None,
    lookup: int = 0,
    before: Sequence[int] = (),
) -> Iterator[Step]:
    """Generate as generate() does, and yield logits too. `before` holds the ids in the cache, for the repetition penalty."""
    if cache is None:
        cache = KVCache(model.config)
    tokens = check_prompt(tokens, model)
    check_room(tokens, cache)
    check_counts(max_tokens, seed)
    before = [*before, *tokens.tolist()]
    if sampling.repetition_penalty != 1 and len(before) != (n := int(cache.n_tokens) + len(tokens)):
        found = f"{len(before) - len(tokens)} ids for {n - len(tokens)} tokens in the cache"
        raise ValueError(f"found {found}: a repetition penalty needs them all, as `before`")
    if lookup < 0:
        raise ValueError(f"lookup is {lookup}, expected 0 or more")
    if lookup and sampling.temperature > 0:
        raise ValueError(f"lookup works only at temperature 0, found {sampling.temperature}")
    if lookup:
        return _decode_by_lookup(model, tokens, max_tokens, sampling, stop_ids_of(model, stop_ids), cache, before, lookup)
    return _decode(model, tokens, max_tokens, sampling, seed, stop_ids_of(model, stop_ids), cache, before)


def _decode(
    model: Model,
    tokens: np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: frozenset[int],
    cache: KVCache,
    before: list[int],
) -> Iterator[Step]:
    rng = np.random.default_rng(seed)
    logits = prefill(model, tokens, cache)
    for made in range(max_tokens):
        token = draw(logits, sampling, rng, f"token {made + 1}", before)
        if token in stop:
            return
        before.append(token)
        yield Step(token, logits)
        if made + 1 == max_tokens or cache.n_tokens.max() == model.config.max_seq_len:
            return
        logits = forward(model.params, model.config, [token], cache, last_only=True, ops=model.ops)[-1]


def _decode_by_lookup(
    model: Model,
    tokens: np.ndarray,
    max_tokens: int,
    sampling: Sampling,
    stop: frozenset[int],
    cache: KVCache,
    before: list[int],
    k: int,
) -> Iterator[Step]:
    """Decode greedily with prompt lookup: one pass verifies several proposed tokens (Saxena 2023, "Prompt lookup decoding").

    A pass over the last token and the proposals after it gives the logits after each. Proposals are accepted up to the first
    that differs from the greedy choice; the cache forgets the others.
    """
    known = _Lookup()
    for token in tokens.tolist():
        known.add(token)
    proposed: list[int] = []
    rng = np.random.default_rng(0)  # greedy decoding draws nothing from it
    logits = prefill(model, tokens, cache)[None]
    made = 0
    while made < max_tokens:
        accepted, length = 0, cache.length - len(proposed)
        try:
            for row in logits:
                token = draw(row, sampling, rng, f"token {made + 1}", before)
                if token in stop:
                    return
                before.append(token)
                yield Step(token, row)
                known.add(token)
                made += 1
                if made == max_tokens or accepted == len(proposed) or token != proposed[accepted]:
                    break
                accepted += 1
        finally:
            cache.truncate(length + accepted)
        room = min(model.config.max_seq_len - int(cache.n_tokens), max_tokens - made)
        if room <= 0:
            return
        proposed = known.propose(min(k, room - 1))
        logits = forward(model.params, model.config, [token, *proposed], cache, ops=model.ops)


class _Lookup:
    """The tokens so far, and for each n-gram the index after its latest occurrence."""

    SIZES = (4, 3, 2)  # n-gram sizes; the longest match is taken, and of equal ones the latest

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> that index

    def add(self, token: int) -> None:
        for size in self.SIZES:
            if len(self._tokens) >= size:
                self._follows[tuple(self._tokens[-size:])] = len(self._tokens)
        self._tokens.append(token)

    def propose(self, k: int) -> list[int]:
        for size in self.SIZES:
            if (start := self._follows.get(tuple(self._tokens[-size:]))) is not None:
                return self._tokens[start : start + k]
        return []


def generate_batch(
    model: Model,
    prompts: Iterable[Sequence[int] | np.ndarray],
    max_tokens: int = 64,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts at once: yield in each step one id per prompt, None for those that have ended.

    Each prompt gets the tokens it would get alone, except where two tie within rounding; prompt i draws with (seed, i). Their
    lengths may differ, and they are given without padding. Raises ValueError as generate() does.
    """
    rows = [check_prompt(prompt, model) for prompt in prompts]
    if not rows:
        raise ValueError("there is no prompt, expected at least one")
    longest = max(map(len, rows))
    batch = np.full((len(rows), longest), -1)
    for padded, row in zip(batch, rows, strict=True):
        padded[longest - len(row) :] = row  # on the left, so that all continue from the same slot
    cache = KVCache(model.config, (len(rows),))
    check_room(batch, cache)
    check_counts(max_tokens, seed)
    return _decode_batch(model, batch, max_tokens, sampling or Sampling(), seed, stop_ids_of(model, stop_ids), cache)


def _decode_batch(
    model: Model, batch: np.ndarray, max_tokens: int, sampling: Sampling, seed: int, stop: frozenset[int], cache: KVCache
) -> Iterator[list[int | None]]:
    n = len(batch)
    rngs = [np.random.default_rng([seed, i]) for i in range(n)]
    before = [row[row >= 0].tolist() for row in batch]
    logits = prefill(model, batch, cache)
    running = np.full(n, True)
    for made in range(max_tokens):
        name = f"token {made + 1} of prompt"
        ids = [draw(logits[i], sampling, rngs[i], f"{name} {i + 1}", before[i]) if running[i] else -1 for i in range(n)]
        running &= [id not in stop for id in ids]
        for earlier, id in zip(before, ids, strict=True):
            earlier += [id] if id >= 0 else []
        if not running.any():
            return
        yield [id if on else None for id, on in zip(ids, running, strict=True)]
        running &= cache.n_tokens < model.config.max_seq_len
        if made + 1 == max_tokens or not running.any():
            return
        column = np.where(running, ids, -1)[:, None]
        logits = forward(model.params, model.config, column, cache, last_only=True, ops=model.ops)[:, -1]


def draw(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator, name: str, before: Sequence[int] = ()) -> int:
    """Sample as sample() does; the message of an error names the token."""
    try:
        return sample(logits, sampling, rng, before)
    except LogitsError as error:
        raise LogitsError(f"new {name}: {error}") from None


def prefill(model: Model, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
    """Put a prompt into the cache and return the logits after its last token.    int [..., T] -> [..., V]

    Raises ValueError, before anything is computed, for a prompt that does not fit the context.
    """
    check_room(tokens, cache)
    starts = range(0, max(1, tokens.shape[-1]), PREFILL_CHUNK)
    for start in starts:
        chunk = tokens[..., start : start + PREFILL_CHUNK]
        logits = forward(model.params, model.config, chunk, cache, last_only=True, ops=model.ops)
    return logits[..., -1, :]


class TextStream:
    """The text of ids as they are generated, up to the first stop string; pieces never break a character.

    Text that may be the beginning of a stop string is held back until later ids decide.
    """

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()):
        self._decoder, self._stop, self._held = decoder, tuple(stop), ""
        self.ended = False  # by a stop string

    def push(self, id: int) -> str:
        """Return the text that is certain once this id is known; none after a stop string."""
        return self._certain(self._decoder.push(id))

    def flush(self) -> str:
        """Return the text that was held back, when no id follows."""
        text = self._certain(self._decoder.flush())
        text, self._held = text + self._held, ""
        return text

    def _certain(self, text: str) -> str:
        if self.ended:
            return ""
        self._held += text
        if ends := [i for s in self._stop if (i := self._held.find(s)) >= 0]:
            text, self._held, self.ended = self._held[: min(ends)], "", True
            return text
        n = len(self._held)  # a stop string may be far longer, and its beginnings are as many as its letters
        keep = max((k for s in self._stop for k in range(1, min(len(s), n + 1)) if self._held.endswith(s[:k])), default=0)
        cut = n - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def stream_text(ids: Iterable[int], decoder: StreamDecoder, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of ids as they are generated, up to the first stop string (TextStream)."""
    stream = TextStream(decoder, stop)
    for id in ids:
        if text := stream.push(id):
            yield text
        if stream.ended:
            return
    if text := stream.flush():
        yield text


def check_prompt(tokens: Sequence[int] | np.ndarray, model: Model) -> np.ndarray:
    """Return the ids of one prompt as an array; ValueError if there are none, or one is not in the vocabulary."""
    if isinstance(tokens, str):
        raise ValueError("a prompt of text: expected token ids; npllama.complete(model, text) takes text")
    tokens = check_tokens(tokens, model.config)
    if (smallest := tokens.min()) < 0:
        raise ValueError(f"token id {smallest} is outside the vocabulary: expected 0 to {model.config.vocab_size - 1}")
    if tokens.ndim != 1:
        raise ValueError(f"a prompt of shape {tokens.shape}: expected the ids of one text (generate_batch takes several)")
    return tokens


def check_counts(max_tokens: int, seed: int) -> None:
    """Raise ValueError for a negative max_tokens or seed."""
    for name, value in (("max_tokens", max_tokens), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more")


def check_room(tokens: np.ndarray, cache: KVCache) -> None:
    """Raise ValueError for more tokens than the context holds after those in the cache.    int [..., T]"""
    n = int(np.max(cache.n_tokens + np.count_nonzero(tokens >= 0, axis=-1)))
    if n > cache.max_seq_len:
        raise ValueError(f"the prompt has {n:,} tokens, the model's context holds {cache.max_seq_len:,}")


def stop_ids_of(model: Model, given: Iterable[int] | None) -> frozenset[int]:
    """Return the ids that end a text: those given, or else the tokenizer's."""
    if given is not None:
        return frozenset(given)
    return model.tokenizer.stop_ids if model.tokenizer else frozenset()
