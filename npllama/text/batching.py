"""Several texts decoded together, each of which joins and leaves by itself: continuous batching.

    batch = Batch(model, rows=8)
    row = batch.join(ids, Sampling(temperature=0.8), seed=1)
    while batch.busy:
        for row, step in batch.step():  # a token for each row, and a chunk of one prompt
            ...                         # and batch.leave(row) when its text has ended

A text gets the tokens that it gets alone, up to ties within rounding, whatever the other rows do.
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


class Stalled(NpllamaError):
    """Texts are there, and no step can continue any of them."""


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
    """Rows of one cache, and the texts that are in them; not for use by several threads at once.

    capacity  slots that a row has from the beginning: with as many as a text gets, no row is ever copied
    chunk     tokens of a prompt that are read in one step, while the others wait
    """

    def __init__(self, model: Model, rows: int, capacity: int = 0, chunk: int = PREFILL_CHUNK):
        if rows < 1 or chunk < 1:
            raise ValueError(f"found {rows} rows and chunks of {chunk} tokens, expected at least 1 of each")
        self.model, self.chunk = model, chunk
        self.cache = KVCache(model.config, (rows,), capacity)
        self._texts: list[_Text | None] = [None] * rows

    @property
    def free(self) -> int:
        """How many more texts can join."""
        return self._texts.count(None)

    @property
    def busy(self) -> bool:
        """Whether step() has anything to do: a text is there whose context isn't full."""
        return any(text is not None and not self._is_full(row) for row, text in enumerate(self._texts))

    def join(
        self,
        tokens: Sequence[int] | np.ndarray,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        watch: Callable[[np.ndarray], object] | None = None,
    ) -> int:
        """Take in a prompt and return its row, the first that is free; step() reads it chunk by chunk.

        `watch` is called with the logits after each of the prompt's tokens, a chunk at a time.    [T, V]
        Raises ValueError where no row is free, and for a prompt that generate() refuses.
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
        """Forget the row's text: the row is free."""
        self._texts[row] = None
        self.cache[row].truncate(0)

    def step(self) -> list[tuple[int, Step | LogitsError]]:
        """Return a new token for each text whose prompt has been read, by its row; and read a chunk of one prompt.

        A row whose logits allow no token gets a LogitsError each time: it is for the caller to let it leave, as it is to end a
        text at a stop id. A text whose context is full gets no more tokens.
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
        """Return what step() makes, for a loop that ends when all texts have left: such a loop must not turn for ever.

        Raises Stalled where the step neither made a token nor read any of a prompt.
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
        """Make one pass over the last token of each text that is being continued."""
        going = np.array([t is not None and t.made > 0 and t.logits is None for t in self._texts])
        going &= self.cache.n_tokens < self.model.config.max_seq_len
        if not going.any():
            return
        n = 1 + int(np.flatnonzero(going)[-1])  # rows after the last of them take no part
        column = [[text.ids[-1] if text and on else -1] for text, on in zip(self._texts, going[:n], strict=False)]
        cache = self.cache[:n].only(going[:n])
        logits = forward(self.model.params, self.model.config, column, cache, last_only=True, ops=self.model.ops)[:, -1]
        for text, row, on in zip(self._texts, logits, going, strict=False):
            if text and on:
                text.logits = row

    def _read_chunk(self) -> None:
        """Read a chunk of the shortest rest of a prompt, so that no short one waits for a long one."""
        waiting = [(row, text) for row, text in enumerate(self._texts) if text and text.read < text.n_prompt]
        if not waiting:
            return
        row, text = min(waiting, key=lambda item: item[1].n_prompt - item[1].read)
        ids = text.ids[text.read : min(text.read + self.chunk, text.n_prompt)]
        model = self.model
        logits = forward(model.params, model.config, ids, self.cache[row], last_only=text.watch is None, ops=model.ops)
        text.read += len(ids)
        if text.watch:
            text.watch(logits)
        if text.read == text.n_prompt:
            text.logits = logits[-1]

    def _is_full(self, row: int) -> bool:
        text = self._texts[row]
        return text is not None and text.made > 0 and self.cache.n_tokens[row] == self.model.config.max_seq_len
