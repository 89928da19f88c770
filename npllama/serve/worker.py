"""The thread that computes: requests wait in a queue, join the batch, get a token at each step, and leave."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checkpoint import Model
from ..engine.ranks.groups import RankLost
from ..engine.ranks.passes import check_ranks
from ..errors import NpllamaError, reason
from ..generation import Step
from ..sampling import LogitsError, Sampling
from ..text.batching import Batch
from ..text.completion import Continuation, TokenLogprobs

IDLE = 1.0  # seconds from one check of the ranks to the next while there is nothing to compute


class Full(NpllamaError):
    """The queue is full."""


class Closed(NpllamaError):
    """The server is shutting down."""


@dataclass
class Job:
    """One text to be generated. The worker's thread calls `tell` with each new piece of text, and at the end.

    echo_logprobs      alternatives for each token of the prompt; None: no log-probabilities of the prompt
    stop_alternatives  alternatives for the stop id that ends the text; None: no log-probability of it
    prompt_logprobs    one entry for each token of the prompt, None for the first
    stop_logprobs      the entry of the stop id that ended the text
    error              why the text ended without a finish reason
    cancelled          set when the client no longer needs the text
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
        """Return whether the text has ended, with a finish reason or an error."""
        return self.error is not None or self.continuation.ended

    def read(self, model: Model, logits: np.ndarray) -> None:
        """Record the prompt's log-probabilities from the logits after each token of a chunk.    [T, V]"""
        ids, entries = self.continuation.completion.prompt_tokens, self.prompt_logprobs
        if not entries:
            entries.append(None)
        # One row at a time: in float64 a whole chunk's log-probabilities would take twice the memory of its logits.
        for row in logits[: len(ids) - len(entries)]:
            entries.append(TokenLogprobs.of(model.tokenizer, Step(ids[len(entries)], row), self.echo_logprobs or 0))


class Worker:
    """Compute, in one thread, the jobs that any number of threads submit.

    rows   texts that are decoded together
    most   jobs that may wait for a row
    chunk  most tokens of prompts that are read between two decode steps
    lost   the error of a rank that is lost, after which nothing more can be computed; else None
    """

    def __init__(self, model: Model, rows: int, most: int, chunk: int = 128):
        self.model, self.rows, self.most = model, rows, most
        self.lost: RankLost | None = None
        self._batch = Batch(model, rows, chunk=chunk)
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="npllama serve", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Return whether no job is waiting or running."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs of one request, or none of them. Raises Full or Closed."""
        with self._changed:
            if self._closed:
                raise Closed("the server is shutting down")
            if len(self._waiting) + len(jobs) > self.most + self._batch.free:
                raise Full(f"the queue is full ({len(self._waiting)} of {self.most} texts are waiting): try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drop jobs at the next step, as their client has disconnected."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Accept no more jobs; the thread ends when those submitted before have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abort(self) -> None:
        """Accept no more jobs, and end the others at once with the error Closed, after the pass under way."""
        with self._changed:
            self._closed = True
            for job in [*self._running.values(), *self._waiting]:
                job.cancelled = True
                if not job.ended:
                    self._end(job, Closed("the server is shutting down"))
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end after close(); return False if it hasn't within `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                if not self._next():
                    return
                for row, step in self._batch.advance():
                    self._take(row, step)
            except RankLost as error:
                self.lost = error
                self.close()
                self._fail(error)
            except Exception as error:  # out of memory, for example: these texts end, the server goes on
                self._fail(error)

    def _next(self) -> bool:
        """Let texts join and leave, and wait until there is something to compute; return False at the end.

        Raises RankLost for a rank that ends meanwhile.
        """
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
                if not self._changed.wait(IDLE):
                    check_ranks(self.model.params)

    def _join(self, job: Job) -> None:
        ids = job.continuation.completion.prompt_tokens
        watch = None if job.echo_logprobs is None else lambda logits: job.read(self.model, logits)
        try:
            row = self._batch.join(ids, job.sampling, job.seed, watch)
        except ValueError as error:
            self._end(job, error)
        else:
            self._running[row] = job

    def _take(self, row: int, step: Step | LogitsError) -> None:
        job = self._running[row]
        if job.cancelled:  # it leaves before the next step
            return
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
                self._end(job, NpllamaError(f"{type(error).__name__}: {reason(error)}"))

    def _end(self, job: Job, error: Exception) -> None:
        job.error = error
        job.tell("")
