"""The worker's thread: what ends a text that can't go on."""

from __future__ import annotations

import threading

from npllama import Model, Sampling
from npllama.errors import NpllamaError
from npllama.serve.worker import Job, Worker
from npllama.text.batching import Batch
from npllama.text.completion import Continuation

from tiny import CONFIGS, random_params

MODEL = Model(CONFIGS["grouped"], random_params(CONFIGS["grouped"], seed=1))


def run(worker: Worker, n: int) -> Job:
    """Return a job of n tokens after it has ended."""
    ended = threading.Event()
    job = Job(Continuation(MODEL, [1, 2], n), Sampling(), [0], lambda text: job.ended and ended.set(), n)
    worker.submit([job])
    assert ended.wait(60)
    return job


def test_a_batch_that_makes_nothing_ends_its_texts_and_not_the_worker(monkeypatch):
    worker = Worker(MODEL, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda batch: [])
        job = run(worker, 5)
    assert isinstance(job.error, NpllamaError)
    assert str(job.error).startswith("Stalled: a step made no token and read none: 1 texts have not left")
    assert worker.idle
    job = run(worker, 5)
    assert (job.error, len(job.continuation.completion.tokens)) == (None, 5)
    worker.close()
    assert worker.join(60)
