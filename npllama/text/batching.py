"""Continuous batching: texts are decoded together, and each joins and leaves independently of the others.

    batch = Batch(model, rows=8)
    row = batch.join(ids, Sampling(temperature=0.8), seed=1)
    while batch.busy:
        for row, step in batch.step():  # decode a token in each row, and prefill a chunk of prompts
            ...                         # call batch.leave(row) when its text has ended

Each text gets the tokens that it gets alone, except where tokens tie within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..cache import KVCache
from ..checkpoint import Model
from ..errors import NpllamaError
from ..generation import PREFILL_CHUNK, Step, check_counts, check_prompt, check_room, draw
from ..model import forward
from ..sampling import LogitsError, Sampling

PADDED = 0.25  # at most this share of a prefill pass is padding: more costs longer than a pass of its own for each length


class Stalled(NpllamaError):
    """No step can continue any of the texts that haven't left."""


@dataclass
class _Text:
    """A text in one of the rows."""

    ids: list[int]
    sampling: Sampling
    rng: np.random.Generator
    n_prompt: int
    read: int = 0  # ids that the cache holds
    made: int = 0
    watch: Callable[[np.ndarray], object] | None = None
    logits: np.ndarray | None = None  # [V], after the last id


class Batch:
    """Rows of one cache, each free or holding a text. Not thread-safe.

    capacity  slots per row allocated at the start; if no text exceeds them, rows are never copied
    chunk     most tokens of prompts, padding included, that one step prefills while the other texts wait
    """

    def __init__(self, model: Model, rows: int, capacity: int = 0, chunk: int = PREFILL_CHUNK):
        if rows < 1 or chunk < 1:
            raise ValueError(f"found {rows} rows and chunks of {chunk} tokens, expected at least 1 of each")
        self.model, self.chunk = model, chunk
        self.cache = KVCache(model.config, (rows,), capacity)
        self._texts: list[_Text | None] = [None] * rows

    @property
    def free(self) -> int:
        """Return how many more texts can join."""
        return self._texts.count(None)

    @property
    def busy(self) -> bool:
        """Return whether step() can continue a text: one whose context isn't full."""
        return any(text is not None and not self._is_full(row) for row, text in enumerate(self._texts))

    def join(
        self,
        tokens: Sequence[int] | np.ndarray,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        watch: Callable[[np.ndarray], object] | None = None,
    ) -> int:
        """Put a prompt into the first free row and return the row; step() prefills it in chunks.

        `watch` is called for each chunk, with the logits after each of its tokens.    [T, V]
        Raises ValueError if no row is free, and for a prompt that generate() refuses.
        """
        ids = check_prompt(tokens, self.model)
        check_counts(0, min(np.atleast_1d(seed)))
        if not self.free:
            raise ValueError(f"all {len(self._texts)} rows are taken, expected one that is free")
        row = self._texts.index(None)
        check_room(ids, self.cache[row])
        rng = np.random.default_rng(seed)
        self._texts[row] = _Text(ids.tolist(), sampling or Sampling(), rng, len(ids), watch=watch)
        return row

    def leave(self, row: int) -> None:
        """Remove the row's text, so that the row is free."""
        self._texts[row] = None
        self.cache[row].truncate(0)

    def step(self) -> list[tuple[int, Step | LogitsError]]:
        """Decode a token in each row whose prompt has been read, prefill a chunk of prompts, and return the new tokens by row.

        A row with invalid logits gets a LogitsError at each step: the caller removes it, as it ends texts at a stop id. A text
        whose context is full gets no more tokens.
        """
        self._decode()
        self._read_chunk()
        made: list[tuple[int, Step | LogitsError]] = []
        for row, text in enumerate(self._texts):
            if text is None or text.logits is None:
                continue
            try:
                id = draw(text.logits, text.sampling, text.rng, f"token {text.made + 1}", text.ids)
            except LogitsError as error:
                made.append((row, error))
                continue
            made.append((row, Step(id, text.logits)))
            text.ids.append(id)
            text.made, text.logits = text.made + 1, None
        return made

    def advance(self) -> list[tuple[int, Step | LogitsError]]:
        """Return the result of step(), for a loop that ends when all texts have left, which must not run for ever.

        Raises Stalled if the step neither generated a token nor read one of a prompt.
        """
        before = self._n_read
        made = self.step()
        if made or self._n_read > before:
            return made
        rows = [row for row, text in enumerate(self._texts) if text is not None]
        full = [row for row in rows if self._is_full(row)]
        found = f"a step made no token and read none: {len(rows)} texts have not left, {len(full)} of them with a full context"
        raise Stalled(f"{found} of {self.model.config.max_seq_len:,} tokens")

    @property
    def _n_read(self) -> int:
        return sum(text.read for text in self._texts if text is not None)

    def _decode(self) -> None:
        """Run one pass over the last token of each text that is being continued."""
        going = np.array([t is not None and t.made > 0 and t.logits is None for t in self._texts])
        going &= self.cache.n_tokens < self.model.config.max_seq_len
        if not going.any():
            return
        n = 1 + int(np.flatnonzero(going)[-1])  # later rows are left out of the pass
        column = [[text.ids[-1] if text and on else -1] for text, on in zip(self._texts, going[:n], strict=False)]
        cache = self.cache[:n].only(going[:n])
        logits = forward(self.model.params, self.model.config, column, cache, last_only=True, ops=self.model.ops)[:, -1]
        for text, row, on in zip(self._texts, logits, going, strict=False):
            if text and on:
                text.logits = row

    def _read_chunk(self) -> None:
        """Prefill in one pass the next tokens of the prompts in some neighbouring rows, padded on the left."""
        rests = [min(self.chunk, text.n_prompt - text.read) if text else 0 for text in self._texts]
        if not any(rests):
            return
        rows = rows_to_read(rests, self.chunk)
        texts = [text for text in self._texts[rows] if text]
        width = max(rests[rows])
        tokens = np.full((len(texts), width), -1)
        for padded, text, n in zip(tokens, texts, rests[rows], strict=True):
            padded[width - n :] = text.ids[text.read : text.read + n]
        model, unwatched = self.model, all(text.watch is None for text in texts)
        logits = forward(model.params, model.config, tokens, self.cache[rows], last_only=unwatched, ops=model.ops)
        for text, after, n in zip(texts, logits, rests[rows], strict=True):  # after [width or 1, V]
            text.read += n
            if text.watch:
                text.watch(after[width - n :])
            if text.read == text.n_prompt:
                text.logits = after[-1]

    def _is_full(self, row: int) -> bool:
        text = self._texts[row]
        return text is not None and text.made > 0 and self.cache.n_tokens[row] == self.model.config.max_seq_len


def rows_to_read(rests: Sequence[int], chunk: int) -> slice:
    """Choose neighbouring rows to prefill in one pass: as many tokens as possible, within the chunk and with little padding.

    rests  tokens that each row has to read, at most chunk; 0 for none

    The row with the fewest is always among them, so that no short prompt waits for a long one.
    """
    shortest = min((row for row, rest in enumerate(rests) if rest), key=rests.__getitem__)
    best, most = slice(0), 0
    for width in sorted({rest for rest in rests if rest}):
        start = stop = shortest
        while start > 0 and 0 < rests[start - 1] <= width:
            start -= 1
        while stop < len(rests) and 0 < rests[stop] <= width:
            stop += 1
        n = min(stop - start, chunk // width)
        start = max(start, min(shortest, stop - n))
        rows = slice(start, start + n)
        if most < (n_tokens := sum(rests[rows])) >= (1 - PADDED) * n * width:
            best, most = rows, n_tokens
    return best
