"""Test the worker's thread: texts that can't continue, stop ids, and the chunks between decode steps."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

import npllama
from npllama import Model, Sampling, forward
from npllama.engine.ranks.groups import RankLost
from npllama.errors import NpllamaError
from npllama.sampling import log_probabilities
from npllama.serve.worker import IDLE, Closed, Job, Worker
from npllama.text import batching
from npllama.text.batching import Batch
from npllama.text.completion import Continuation

from tiny import CONFIGS, random_params, random_tokens

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


def test_a_lost_rank_ends_the_worker(monkeypatch):
    """End the texts with the rank's error, and take no more jobs."""
    worker = Worker(MODEL, 2, 4)

    def lose(batch):
        raise RankLost("rank 1 of 2 (process 7) was ended by SIGKILL")

    monkeypatch.setattr(Batch, "step", lose)
    job = run(worker, 5)
    assert str(job.error) == "RankLost: rank 1 of 2 (process 7) was ended by SIGKILL"
    assert worker.join(60)
    assert str(worker.lost) == "rank 1 of 2 (process 7) was ended by SIGKILL"
    with pytest.raises(Closed):
        worker.submit([job])


@pytest.mark.skipif(os.name != "posix", reason="not a POSIX system: ranks can't be processes")
def test_a_rank_that_is_killed_while_nothing_is_computed_ends_the_worker():
    model = npllama.load(processes=2)
    worker = Worker(model, 2, 4)
    assert not worker.join(2.5 * IDLE)
    model.params.lead.__self__.group._processes[0].kill()
    assert worker.join(60)
    assert re.fullmatch(r"rank 1 of 2 \(process \d+\) was ended by SIGKILL", str(worker.lost))


def test_between_two_tokens_of_a_text_the_others_read_at_most_a_chunk(monkeypatch):
    """Count in tokens and passes, not in seconds, how long prompts that arrive meanwhile stall a running text."""
    events: list[int | str] = []  # the number of tokens of each pass, padding included; "token" for each of the running text

    def recorded(params, config, tokens, *args, **options):
        events.append(np.size(tokens))
        return forward(params, config, tokens, *args, **options)

    monkeypatch.setattr(batching, "forward", recorded)
    worker, ended = Worker(MODEL, rows=6, most=20, chunk=16), threading.Semaphore(0)
    lengths = [100, 90, 5, 70, 6, 7, 5, 6]

    def job(n_prompt: int, n: int, tell: Callable[[Job], object]) -> Job:
        prompt = random_tokens(CONFIGS["grouped"], n_prompt, n_prompt).tolist()
        made = Job(Continuation(MODEL, prompt, n, stop_ids=()), Sampling(), [0], lambda text: tell(made), n)
        return made

    others = [job(n, 2, lambda other: other.ended and ended.release()) for n in lengths]

    def note(running: Job) -> None:
        events.append("token")
        if len(running.continuation.completion.tokens) == 5:
            worker.submit(others)  # on the worker's thread: between two of its steps
        if running.ended:
            ended.release()

    worker.submit([job(3, 60, note)])
    for _ in range(len(lengths) + 1):
        assert ended.acquire(timeout=60)
    worker.close()
    assert worker.join(60)
    assert [len(other.continuation.completion.tokens) for other in others] == [2] * len(others)
    last = len(events) - events[::-1].index("token")
    stalls = [
        list(passes) for is_token, passes in itertools.groupby(events[:last], lambda event: event == "token") if not is_token
    ]
    assert sum(map(sum, stalls)) > sum(lengths)  # the prompts were read while the text was running
    assert all(len(passes) <= 2 for passes in stalls)  # its own step, and at most one more pass
    assert all(passes[0] <= 6 and sum(passes[1:]) <= 16 for passes in stalls[1:])
    assert max(len(passes) for passes in stalls) == 2


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
