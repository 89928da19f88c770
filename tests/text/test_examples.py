"""Run the examples in the reference."""

from __future__ import annotations

import doctest

import pytest

from npllama import text


@pytest.mark.parametrize("module", [text], ids=lambda module: module.__name__)
def test_the_examples_of_the_reference(module):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
