"""Fixture: ranks in threads of this process."""

from __future__ import annotations

import pytest

import thread_ranks


@pytest.fixture
def spread():
    """Return a function that spreads parameters over ranks in threads, which end with the test."""
    leaders = []

    def make(params, config, size):
        found, ranks = thread_ranks.spread(params, config, size)
        leaders.append(found.lead.__self__)
        return found, ranks

    yield make
    for leader in leaders:
        leader.close()
