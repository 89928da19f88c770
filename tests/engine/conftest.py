"""Fixture: the number of threads, as it was."""

from __future__ import annotations

import pytest

from npllama.engine import threads


@pytest.fixture
def threads_restored():
    """Set the number of threads back after a test that changes it."""
    before = threads.n_threads()
    yield
    threads.set_threads(before)
