"""Test the end of a server whose requests don't finish in time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import npllama
from npllama.engine.ranks.groups import RankLost
from npllama.text import batching

openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

from serving import served  # noqa: E402


def test_a_lost_rank_ends_the_server(monkeypatch):
    """End the request with the rank's error, then the server."""

    def lose(batch):
        raise RankLost("rank 1 of 2 (process 7) was ended by SIGKILL")

    monkeypatch.setattr(batching.Batch, "step", lose)
    with served(npllama.load()) as ending:
        status, reply = ending.post("/v1/completions", {"prompt": "O"})
        assert (status, reply["error"]["message"]) == (500, "RankLost: rank 1 of 2 (process 7) was ended by SIGKILL")
        until = time.monotonic() + 20
        while ending.server.servers[0].is_serving():
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_text_that_is_not_done_in_time_ends_with_an_error_at_shutdown(monkeypatch):
    passes = []

    def slow(*args, **options):
        passes.append(args)
        time.sleep(0.05)
        return npllama.forward(*args, **options)

    monkeypatch.setattr(batching, "forward", slow)
    arguments = {"model": "demo", "prompt": "O", "max_tokens": 500, "temperature": 0}
    with served(npllama.load(), rows=1, grace=0.5) as ending, ending.client as client, ThreadPoolExecutor(1) as pool:
        stream = client.completions.create(**arguments, stream=True)
        next(iter(stream))
        waiting = pool.submit(client.completions.create, **arguments)
        while len(ending.server.server_state.tasks) < 2:
            time.sleep(0.02)
        ending.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as caught:
            waiting.result()
        assert caught.value.status_code == 503
    assert len(passes) < 250
