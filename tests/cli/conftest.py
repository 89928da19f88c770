"""Fixtures: models that the tests of the command line share."""

from __future__ import annotations

import shutil

import pytest

from npllama import checkpoint
from npllama.checkpoint import demo_path

from tiny import CONFIGS, random_params


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Write a tiny model directory without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "bare"
    with checkpoint.create(path, CONFIGS["grouped"], "float32", source={"kind": "test"}) as writer:
        for name, array in random_params(CONFIGS["grouped"], seed=1).items():
            writer.add(name, array)
    return path


@pytest.fixture
def copy_of_demo(tmp_path):
    shutil.copytree(demo_path(), tmp_path / "demo")
    return tmp_path / "demo"
