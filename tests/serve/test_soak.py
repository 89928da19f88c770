"""Send a thousand requests, many of which disconnect early: the server's memory, threads and files don't grow."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from npllama import checkpoint

import tiny
from system import hear_signals

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

CONFIG = tiny.config(dim=24, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40, vocab_size=90, n_layers=1)
ROWS, QUEUE, CLIENTS = 4, 12, 8
PATIENCE = 60.0
PADDING = 20_000  # bytes in each request's `user`, which has no effect: if requests were leaked, memory would grow visibly


@pytest.fixture
def server(tmp_path):
    """Return the port and the folder in /proc of a server of a tiny random model without a tokenizer."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system has no /proc/self/fd")
    with checkpoint.create(tmp_path / "tiny", CONFIG, "float32", {"kind": "test"}) as writer:
        for name, array in tiny.random_params(CONFIG, seed=1).items():
            writer.add(name, array)
    command = [sys.executable, "-m", "npllama", "serve", "-m", str(tmp_path / "tiny"), "--port", "0", "--threads", "1"]
    command += ["--rows", str(ROWS), "--queue", str(QUEUE)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals) as process:
        try:
            line = process.stderr.readline()
            port = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
            assert port, line + process.stderr.read()
            yield int(port[1]), Path(f"/proc/{process.pid}")
            process.terminate()
            assert process.stderr.read() == ""  # no traceback, and nothing of a prompt
            assert process.wait() == 0
        finally:
            process.kill()


def message(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + (
        b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
    )


def post(port: int, body: dict[str, object]) -> tuple[int, dict]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def whole(port: int, draw: random.Random, body: dict[str, object]) -> None:
    status, answer = post(port, {**body, "logprobs": 20, "echo": draw.random() < 0.5, "max_tokens": 3})
    assert (status, answer.get("usage", {}).get("completion_tokens")) == (200, 3), answer


def refused(port: int, draw: random.Random, body: dict[str, object]) -> None:
    status, answer = post(port, {**body, "prompt": draw.choice([[999], "a text", [], [1] * 600])})
    assert status == 400, answer


def gone(port: int, draw: random.Random, body: dict[str, object]) -> None:
    """Send a request or its beginning, read the beginning of the answer or nothing, and disconnect, with a reset or without."""
    data = message({**body, "stream": draw.random() < 0.7, "n": draw.choice([1, 1, 3]), "max_tokens": 400})
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
        if data.find(b'"stream": true') > 0 and draw.random() < 0.3:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                connection.recv(draw.choice([1, 500, 5000]))
        if draw.random() < 0.3:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif draw.random() < 0.3:
            time.sleep(draw.random() * 0.02)


def client(port: int, seed: int, n: int) -> Counter[str]:
    """Send n requests one after the other, and count them by kind."""
    draw, done = random.Random(seed), Counter[str]()
    for _ in range(n):
        kind = draw.choices([whole, refused, gone], [3, 1, 6])[0]
        prompt = [draw.randrange(CONFIG.vocab_size) for _ in range(draw.choice([1, 10, 60, 200]))]
        body = {"prompt": prompt, "seed": draw.randrange(1000), "user": "x" * PADDING}
        while True:
            try:
                kind(port, draw, body)
                break
            except AssertionError as error:  # a full queue is expected: try again
                if "queue_full" not in str(error):
                    raise
                time.sleep(0.01)
        done[kind.__name__] += 1
    return done


def has_free_rows(port: int) -> bool:
    """Check that all rows and the whole queue are free: a request of that many texts is accepted, one more is refused."""
    fits = post(port, {"prompt": [[1]] * (ROWS + QUEUE), "max_tokens": 1})[0]
    more = post(port, {"prompt": [[1]] * (ROWS + QUEUE + 1), "max_tokens": 1})[0]
    return (fits, more) == (200, 400)


def wait_until(condition) -> bool:
    end = time.monotonic() + PATIENCE
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


def held_by(process: Path) -> tuple[int, int, int]:
    """Return the bytes of anonymous memory, the threads and the open files of a process."""
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024, int(status["Threads"]), len(list((process / "fd").iterdir()))


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind(server):
    port, process = server
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda i: client(port, i, 30), range(CLIENTS)))  # fills pools and caches, which are kept on purpose
        assert wait_until(lambda: has_free_rows(port))
        before = held_by(process)
        done = sum(pool.map(lambda i: client(port, 100 + i, 125), range(CLIENTS)), Counter())
    assert done.total() == 1000
    assert min(done.values()) > 50
    assert wait_until(lambda: has_free_rows(port))
    assert wait_until(lambda: held_by(process)[2] <= before[2]), "files stay open"
    memory, threads, _ = (after - first for after, first in zip(held_by(process), before, strict=True))
    # The thread pool may keep a thread per client. Leaked requests would take 20 MB and more.
    assert threads <= CLIENTS
    assert memory < 12_000_000
