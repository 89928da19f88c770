"""The folder of fetched models, and the path of a name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from npllama.checkpoint import store


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_names_are_the_folders_that_can_be_asked_for(home):
    assert store.names() == []  # nothing was fetched yet
    for name in ("tiny", "a-1.2", ".tiny.partial-1", "two words"):
        (home / "models" / name).mkdir(parents=True)
    assert store.names() == ["a-1.2", "tiny"]


def test_a_path_comes_before_a_name(home):
    (home / "models" / "tiny").mkdir(parents=True)
    assert store.locate("tiny") == home / "models" / "tiny"
    assert store.locate("./tiny") == Path("tiny")
    Path("tiny").mkdir()
    assert store.locate("tiny") == Path("tiny")


def test_a_name_that_is_nowhere_is_a_path_all_the_same(home):
    assert store.locate("absent") == Path("absent")
    with pytest.raises(ValueError, match="the model's name is empty"):
        store.locate("")


def test_without_a_folder_for_models_the_error_says_how_to_name_one(tmp_path, monkeypatch):
    monkeypatch.delenv("NPLLAMA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"absent: there is no such folder, and .* set NPLLAMA_HOME to one"):
        store.locate("absent")
    assert store.locate("no/name") == Path("no/name")
