"""Test copies of npllama that aren't installed: a zip, the package without its model, a checkout without the converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest

import npllama
from npllama.checkpoint import reading
from npllama.cli import main

from commands import fails, run


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """Write the package alone into a zip that Python can run, as zipapp does."""
    folder = tmp_path_factory.mktemp("zipped")
    package = Path(npllama.__file__).parent
    shutil.copytree(package, folder / "app" / "npllama", ignore=shutil.ignore_patterns("__pycache__"))
    zipapp.create_archive(folder / "app", folder / "npllama.pyz", main="npllama.cli:main")
    shutil.rmtree(folder / "app")
    return folder


def run_zipped(folder: Path, *args: str) -> subprocess.CompletedProcess:
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0]); import npllama.cli; "
    code += "assert '.pyz' in npllama.__file__; sys.exit(npllama.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder / "npllama.pyz"), *args]
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=environment)
    assert list(temporary.iterdir()) == []  # unpacked files are removed
    return done


@pytest.mark.parametrize("command", ["generate", "walkthrough", "info", "verify"])
def test_the_embedded_model_opens_from_a_zip(command, zipped):
    arguments = {"generate": ["ROMEO:", "-n", "5"], "walkthrough": ["Hello"], "info": [], "verify": []}[command]
    found, expected = run_zipped(zipped, command, *arguments), run(command, *arguments)
    assert found.returncode == 0, found.stderr
    if command in ("generate", "walkthrough"):
        assert found.stdout == expected.stdout
    else:
        assert len(found.stdout.splitlines()) == len(expected.stdout.splitlines())


def test_the_page_is_written_from_a_zip(zipped):
    pytest.importorskip("bokeh", reason="bokeh is not installed")
    done = run_zipped(zipped, "explain", "Hello", "-o", "page.html")
    assert done.returncode == 0, done.stderr
    assert (zipped / "page.html").stat().st_size > 10_000


def test_a_copy_without_the_embedded_model_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reading, "__file__", str(tmp_path / "checkpoint" / "reading.py"))
    monkeypatch.setattr(reading.importlib.resources, "files", lambda package: tmp_path)
    reading.unpacked_demo.cache_clear()
    assert "the embedded model is missing from this copy of npllama: expected" in fails(capsys, "info")


@pytest.mark.parametrize("args", [["models"], ["fetch", "smollm2-135m"], ["convert", "a", "b"]], ids=lambda args: args[0])
def test_a_copied_checkout_says_what_it_lacks(args, bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path))
    shutil.copytree(bare, tmp_path / "models" / "mine")
    for name in [name for name in sys.modules if name.split(".")[0] == "npllama_convert"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "npllama_convert", None)
    assert main(args) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(
        f"npllama {args[0]}: needs the package npllama_convert, which is installed with npllama: pip install ."
    )
    assert ("mine" in out) == (args == ["models"])
