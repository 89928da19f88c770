"""The thread that computes: requests wait, join the batch, get a token at each step, and leave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checkpoint import Model
from ..errors import NpllamaError, reason
from ..generation import Step
from ..sampling import LogitsError, Sampling
from ..text.batching import Batch
from ..text.completion import Continuation, TokenLogprobs


class Full(NpllamaError):
    """As many requests wait as may."""


class Closed(NpllamaError):
    """The server is about to end."""


@dataclass
class Job:
    """One text to be made. The worker's thread calls `tell` with each piece that is certain, and at the end.

    prompt_logprobs  one for each of the prompt's tokens, None for the first, if echo_logprobs asks for so many alternatives
    stop_logprobs    that of the stop id that ended the text, if stop_alternatives asks for so many
    error            why it ended without a finish reason
    """

    continuation: Continuation
    sampling: Sampling
    seed: Sequence[int]
    tell: Callable[[str], object]
    max_tokens: int
    echo_logprobs: int | None = None
    stop_alternatives: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    stop_logprobs: TokenLogprobs | None = None
    error: Exception | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether no more will be told."""
        return self.error is not None or self.continuation.ended

    def read(self, model: Model, logits: np.ndarray) -> None:
        """Take the logits after each token of a chunk of the prompt, for the log-probabilities of the tokens that follow."""
        ids, entries = self.continuation.completion.prompt_tokens, self.prompt_logprobs
        if not entries:
            entries.append(None)
        # One row at a time: a chunk's log-probabilities in float64 would be as large as its logits twice over.
        for row in logits[: len(ids) - len(entries)]:
            entries.append(TokenLogprobs.of(model.tokenizer, Step(ids[len(entries)], row), self.echo_logprobs or 0))


class Worker:
    """Computes the jobs of any number of threads in one of its own.

    rows  texts that are decoded together
    most  jobs that may wait for a row
    """

    def __init__(self, model: Model, rows: int, most: int, chunk: int = 128):
        self.model, self.most = model, most
        self._batch = Batch(model, rows, chunk=chunk)
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="npllama serve", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no job waits or runs."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the jobs of one request, all or none. Raises Full or Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is about to end")
            if len(self._waiting) + len(jobs) > self.most + self._batch.free:
                raise Full(f"{len(self._waiting)} texts wait already, of {self.most} that may: try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs at the next step: whoever asked has gone."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, and end when the present ones have."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end after close(); False if it isn't reached in time."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._next():
            try:
                for row, step in self._batch.advance():
                    self._take(row, step)
            except Exception as error:  # memory, say: it is the end of these texts, and not of the server
                self._fail(error)

    def _next(self) -> bool:
        """Wait for something to compute, let texts join and leave; False at the end."""
        with self._changed:
            while True:
                for row in [row for row, job in self._running.items() if job.cancelled]:
                    self._leave(row)
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                while self._waiting and self._batch.free:
                    self._join(self._waiting.popleft())
                if self._running:
                    return True
                if self._closed:
                    return False
                self._changed.wait()

    def _join(self, job: Job) -> None:
        ids = job.continuation.completion.prompt_tokens
        watch = None if job.echo_logprobs is None else lambda logits: job.read(self.model, logits)
        try:
            row = self._batch.join(ids, job.sampling, job.seed, watch)
        except ValueError as error:
            job.error = error
            job.tell("")
        else:
            self._running[row] = job

    def _take(self, row: int, step: Step | LogitsError) -> None:
        job = self._running[row]
        text = ""
        if isinstance(step, LogitsError):
            job.error = step
        else:
            text = self._push(job, step) if job.max_tokens else job.continuation.end()
        if job.ended:
            self._leave(row)
        job.tell(text)

    def _push(self, job: Job, step: Step) -> str:
        done = job.continuation.completion
        before = len(done.tokens)
        text = job.continuation.push(step)
        if job.stop_alternatives is not None and len(done.tokens) == before:
            job.stop_logprobs = TokenLogprobs.of(self.model.tokenizer, step, job.stop_alternatives)
        return text

    def _leave(self, row: int) -> None:
        del self._running[row]
        self._batch.leave(row)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            for row, job in list(self._running.items()):
                self._leave(row)
                job.error = NpllamaError(f"{type(error).__name__}: {reason(error)}")
                job.tell("")
