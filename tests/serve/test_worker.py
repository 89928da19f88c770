"""Test the worker's thread: texts that can't continue, stop ids, and the chunks between decode steps."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from npllama import Model, Sampling, forward
from npllama.errors import NpllamaError
from npllama.sampling import log_probabilities
from npllama.serve.worker import Job, Worker
from npllama.text.batching import Batch
from npllama.text.completion import Continuation

from tiny import CONFIGS, random_params

MODEL = Model(CONFIGS["grouped"], random_params(CONFIGS["grouped"], seed=1))


def run(worker: Worker, n: int, stop_ids: Sequence[int] = (), **options: int) -> Job:
    """Run a job of n tokens to its end, and return it."""
    ended = threading.Event()
    continuation = Continuation(MODEL, [1, 2], n, stop_ids=stop_ids)
    job = Job(continuation, Sampling(), [0], lambda text: job.ended and ended.set(), n, **options)
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


def test_the_stop_id_that_ends_a_text_has_its_log_probability():
    worker = Worker(MODEL, 2, 4)
    tokens = run(worker, 5).continuation.completion.tokens
    assert tokens[3] not in tokens[:3]
    job = run(worker, 5, stop_ids=[tokens[3]], stop_alternatives=2)
    assert job.continuation.completion.tokens == tokens[:3]
    expected = log_probabilities(forward(MODEL.params, MODEL.config, [1, 2, *tokens[:3]])[-1])
    assert job.stop_logprobs.token == tokens[3]
    assert job.stop_logprobs.logprob == pytest.approx(expected[tokens[3]], abs=1e-5)
    assert [id for id, _, _ in job.stop_logprobs.top] == np.argsort(-expected)[:2].tolist()
    assert run(worker, 5, stop_alternatives=2).stop_logprobs is None
    assert run(worker, 5, stop_ids=[tokens[3]]).stop_logprobs is None
    worker.close()
    assert worker.join(60)
