"""Test the program of the other ranks by itself."""

from __future__ import annotations

import json
import os
import tempfile

import pytest

from npllama.engine.ranks import following, local

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not a POSIX system: ranks can't be processes")


@pytest.fixture
def worker():
    """Start rank 1 of 2; the test is rank 0."""
    assert following.__name__ in local.WORKER
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), local.HEADER + 4 * local.SLOT)
        process = local.start_process(1, 2, file.fileno(), bells := local.make_bells(2))
    yield process
    process.kill()
    process.communicate()
    for end in bells:
        os.close(end)


def test_it_ends_when_rank_0_does(worker):
    assert worker.communicate() == (b"", None)
    assert worker.returncode == 0


def test_it_says_why_it_can_t_load(worker):
    order = {"path": "/nowhere", "dtype": "stored", "threads": 1}
    found, _ = worker.communicate(b'{"path": "/no\n' + json.dumps(order).encode() + b"\n")  # the first was cut short
    assert json.loads(found)["failed"].startswith("/nowhere: not found")
