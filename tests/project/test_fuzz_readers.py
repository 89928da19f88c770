"""Damaged files for every reader, each group of readers in a process of its own: a crash is a failure too.

NPLLAMA_FUZZ_SECONDS is for how long, for all groups together; without it 120 cases for each reader, the same at every run.
"""

from __future__ import annotations

import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from npllama_convert import sources

pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)

import fuzz_readers

GROUPS = {"with torch": list(fuzz_readers.NEED_TORCH), "with matplotlib": ["report"]}
GROUPS["with neither"] = [name for name in fuzz_readers.READERS if not any(name in group for group in GROUPS.values())]
GROUP_CASES = ["with neither", "with matplotlib", pytest.param("with torch", marks=pytest.mark.torch)]


def needs(group: str) -> None:
    """Skip if a package that the reader needs is missing; torch has a marker."""
    if group == "with matplotlib":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUP_CASES)
def test_damaged_files_become_a_whole_model_or_one_line(group):
    seconds = os.environ.get("NPLLAMA_FUZZ_SECONDS")
    needs(group)
    how_long = ["--minutes", str(float(seconds) / 60 / len(GROUPS))] if seconds else ["--cases", "120"]
    readers = [argument for name in GROUPS[group] for argument in ("--reader", name)]
    command = [sys.executable, fuzz_readers.__file__, *how_long, *readers]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" cases in ") == len(GROUPS[group])


@pytest.mark.parametrize("group", GROUP_CASES)
def test_a_good_source_of_each_kind_converts(group, tmp_path, quick_conversion):
    """Convert undamaged sources first: otherwise the damage would be done to an unreadable file."""
    needs(group)
    for name in GROUPS[group]:
        folder = tmp_path / name
        folder.mkdir()
        work = tmp_path / f"work-{name}"
        fuzz_readers.READERS[name](folder)
        outcomes = {fuzz_readers.run_case(folder, work, random.Random(f"0 {name} {case}")) for case in range(40)}
        assert outcomes == {"refused", "read"}, name


# --------------------------------------------------------------------------------------------- what chance would hardly find


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Return a checkpoint of Meta's format with one shard, in the working directory where malicious code would leave a file."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "source"
    folder.mkdir()
    fuzz_readers.make_meta(folder)
    (folder / "consolidated.01.pth").unlink()
    return folder


def refused(source: Path, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        sources.convert(source, source.parent / "model", report=str)
    assert "\n" not in str(error.value)
    assert not (source.parent / "model").exists()
    assert list(Path.cwd().iterdir()) == []  # no code ran, no member of a zip was unpacked


@pytest.mark.torch
@pytest.mark.parametrize("form", ["zip", "bare pickle", "module"])
def test_a_pickle_that_runs_code_is_refused(source, form):
    import torch

    path = source / "consolidated.00.pth"
    if form == "zip":
        torch.save({"a": Evil()}, path)
    elif form == "bare pickle":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    else:  # a whole model, as torch.save(model) writes it
        torch.save(torch.nn.Linear(2, 2), path)
    refused(source, r"00\.pth is not a torch checkpoint of plain tensors: loading it would run [\w.]+, which is refused$")


def rewritten(path: Path, change) -> None:
    """Return the same zip with its members changed."""
    members = {info.filename: data for info, data in read_zip(path)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, how in change(members):
            archive.writestr(name, data, how)


def read_zip(path: Path):
    with zipfile.ZipFile(path) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


def stored(members: dict[str, bytes]) -> list[tuple[str, bytes, int]]:
    return [(name, data, zipfile.ZIP_STORED) for name, data in members.items()]


BAD_ZIPS = {
    "a bomb": (
        lambda members: [(name, data + bytes(50_000_000), zipfile.ZIP_DEFLATED) for name, data in members.items()],
        r"holds '.*' compressed, which torch\.save does not do$",
    ),
    "a way out": (
        lambda members: [*stored(members), ("../../evil", b"x", zipfile.ZIP_STORED)],
        r"holds '\.\./\.\./evil', a name outside the archive$",
    ),
    "an absolute name": (
        lambda members: [*stored(members), ("/etc/evil", b"x", zipfile.ZIP_STORED)],
        r"holds '/etc/evil', a name outside the archive$",
    ),
    "no pickle": (
        lambda members: [member for member in stored(members) if not member[0].endswith(".pkl")],
        r"00\.pth is not a torch checkpoint of plain tensors: ",
    ),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("fault", BAD_ZIPS)
def test_a_zip_that_means_harm_is_refused(source, fault):
    change, expected = BAD_ZIPS[fault]
    rewritten(source / "consolidated.00.pth", change)
    refused(source, expected)


@pytest.mark.torch
def test_a_zip_of_absurd_tensors_takes_no_memory(source):
    """Claim a tensor of 2**50 numbers in a storage of a few bytes."""
    import torch

    torch.save({"tok_embeddings.weight": torch.zeros(7)}, source / "consolidated.00.pth")

    def grow(members):
        for name, data in members.items():
            yield name, data.replace(b"K\x07\x85", b"\x8a\x07" + (1 << 50).to_bytes(7, "little") + b"\x85"), zipfile.ZIP_STORED

    rewritten(source / "consolidated.00.pth", grow)
    refused(source, r"00\.pth is not a torch checkpoint of plain tensors: ")


LIMITED = """
import resource, sys
from npllama.cli import main
import gguf, huggingface_hub, sentencepiece, tokenizers
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (512 << 20),) * 2)
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the address space is not known on this system")
@pytest.mark.parametrize("form", ["gguf", "huggingface", "index", "bin"])
def test_gigabytes_that_a_header_claims_are_never_taken(tmp_path, form):
    """Open sparse files of 8 GB, whose headers claim all of it, in half a gigabyte of address space."""
    for package in ("sentencepiece", "tokenizers", "huggingface_hub"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    size, folder = 8 << 30, tmp_path / "source"
    folder.mkdir()
    fuzz_readers.make_hugging_face(folder, n_shards=2 if form == "index" else 1)
    source = folder
    if form == "gguf":
        source = tmp_path / "x.gguf"
        source.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"x" + struct.pack("<IIQ", 9, 0, size - 100))
    elif form == "huggingface":
        (folder / "model.safetensors").write_bytes((size - 8).to_bytes(8, "little") + b"{")
    elif form == "bin":
        source = tmp_path / "x.bin"
        source.write_bytes(b"[" * 64)
    big = {"index": folder / "model.safetensors.index.json", "huggingface": folder / "model.safetensors"}.get(form, source)
    os.truncate(big, size)
    result = subprocess.run([sys.executable, "-c", LIMITED, str(source), str(tmp_path / "m")], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "MemoryError" not in result.stderr
    assert not (tmp_path / "m").exists()


def test_the_command_line_for_longer_runs(tmp_path):
    command = [sys.executable, fuzz_readers.__file__, "--reader", "llama2.c", "--case", "5", "--keep", str(tmp_path / "kept")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("llama2.c: 1 cases in")
    assert (tmp_path / "kept" / "case.txt").read_text() == "--reader llama2.c --seed 0 --case 5\n"
    assert (tmp_path / "kept" / "work").is_dir()
    assert result.stderr == ""
