"""Fixtures: what compare() computes of a reference's model alone is computed once, not for each candidate of a test file."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest

from npllama.golden import trace
from npllama.golden.compare import comparison, hints


def once(function: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """Return the function with a memory; the arguments are kept with the result, so that no id in a key is used again."""
    kept: dict[Hashable, tuple[Any, Any]] = {}

    def remembered(*args: Any) -> Any:
        if (at := key(*args)) not in kept:
            kept[at] = args, function(*args)
        return kept[at][1]

    return remembered


@pytest.fixture(scope="module", autouse=True)
def noise_measured_once() -> Iterator[None]:
    """Let compare() measure the noise floor, which takes five passes, once for the same model, tokens, precision and names."""

    def key(model, tokens, steps, precision, names, parts):
        return id(model), str(tokens.tolist()), str(steps), precision, frozenset(names), parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "measure_noise", once(comparison.measure_noise, key))
        yield


@pytest.fixture(scope="module")
def run_once() -> Iterator[None]:
    """Let hints run a model with each mistake once, not for each candidate."""

    def key(model, tokens, steps, port):
        return id(model), str(tokens.tolist()), str(steps), port.mistakes[0].name, port.computed.profile

    def activations(model, tokens, steps, port):
        found = []
        trace.run(model, tokens, steps, port, lambda name, x: found.append((name, x)) or x)
        return found

    remembered = once(activations, key)

    def run(model, tokens, steps, port, tap):
        for name, x in remembered(model, tokens, steps, port):
            tap(name, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hints, "run", run)
        yield
