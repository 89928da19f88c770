"""The model directory: exact or correctly rounded, whole or absent, and one clear line for everything that is wrong with it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from npllama import Config, checkpoint, parameter_shapes
from npllama.checkpoint import CheckpointError, atomic, load, open_model, reading, verify, writing
from npllama.checkpoint.atomic import FolderError
from npllama.engine.linear import to_bfloat16, widen

import tiny
from system import ROOT, full_disk, hear_signals

CONFIG = tiny.config(dim=24, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40, vocab_size=30, n_layers=1)
NAME = "layers.0.attention.wq.weight"
SHAPES = parameter_shapes(CONFIG)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make blocks so small that every matrix here has several."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 700)


def write(path: Path, dtype="float32", config: Config = CONFIG, changes=None, files=(), **options) -> dict[str, np.ndarray]:
    params = tiny.random_params(config, seed=1) | (changes or {})
    with checkpoint.create(path, config, dtype, {"kind": "test"}, **options) as writer:
        for name, array in params.items():
            writer.add(name, array)
        for name, content in files:
            writer.add_file(name, content)
    return params


def left_next_to(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


# ---------------------------------------------------------------------------------------------------------------- rounding


def test_bfloat16_rounding_agrees_with_ml_dtypes_on_every_kind_of_float32():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    random = np.random.default_rng(0).integers(0, 1 << 32, size=200_000, dtype=np.uint32)
    near_ties = (
        (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)
    ).ravel()
    values = np.concatenate([random, near_ties]).view(np.float32)
    found = to_bfloat16(values).view(ml_dtypes.bfloat16)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    is_nan = np.isnan(values)
    assert np.isnan(found[is_nan].astype(np.float32)).all()
    assert np.array_equal(found[~is_nan].view(np.uint16), expected[~is_nan].view(np.uint16))


@pytest.mark.torch
def test_bfloat16_rounding_agrees_with_torch():
    import torch

    values = np.random.default_rng(1).integers(0, 1 << 32, size=200_000, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float64_is_rounded_once_not_twice(tmp_path, dtype):
    # Just above and below the middle between two 16-bit neighbours, by less than a float32 can tell.
    middles = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-24], np.float64)
    values = np.concatenate([middles, middles * (1 + 2.0**-45), middles * (1 - 2.0**-45)])
    values = np.concatenate([values, -values])
    array = tiny.uniform(0, (24, 24)).astype(np.float64)
    array.ravel()[: len(values)] = values
    write(tmp_path / "m", dtype, changes={NAME: array})
    stored = open_model(tmp_path / "m").params[NAME]
    if dtype == "bfloat16":
        wide, up = (lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)), stored + np.uint16(1)
        below, above, found = wide(stored - np.uint16(1)), wide(up), wide(stored)
    else:
        found = stored
        below, above = np.nextafter(stored, stored.dtype.type(0)), np.nextafter(stored, stored.dtype.type(10) * np.sign(stored))
    error = np.abs(found.astype(np.float64) - array)
    bits = stored if dtype == "bfloat16" else stored.view(f"u{stored.itemsize}")
    for neighbour in (below, above):
        other = np.abs(neighbour.astype(np.float64) - array)
        assert (error <= other).all()
        assert (bits[error == other] % 2 == 0).all()  # ties go to even


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_16_bit_values_survive(tmp_path, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    exponent = 0x7C00 if dtype == "float16" else 0x7F80
    bits = np.array([b for b in range(1 << 16) if b & exponent != exponent], np.uint16)
    config = tiny.config(dim=64, n_heads=2, head_dim=32, n_kv_heads=2, ffn_dim=8, n_layers=1, vocab_size=len(bits) // 64)
    array = (bits if dtype == "bfloat16" else bits.view(np.float16)).reshape(-1, 64)
    write(tmp_path / "same", dtype, config, {"output.weight": array})
    write(tmp_path / "wide", "float32", config, {"output.weight": array})
    wide = load(tmp_path / "wide").params["output.weight"]
    write(tmp_path / "back", dtype, config, {"output.weight": wide})
    for name in ("same", "back"):
        assert np.array_equal(open_model(tmp_path / name).params["output.weight"].view(np.uint16), bits.reshape(-1, 64))
    expected = array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array
    assert np.array_equal(wide, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "source", "dtype", "fits"),
    [
        (65519.0, np.float32, "float16", True),  # rounds to 65504, the largest float16
        (65520.0, np.float32, "float16", False),  # rounds to infinity
        (-70000.0, np.float64, "float16", False),
        (3.3895314e38, np.float32, "bfloat16", True),
        (3.4e38, np.float32, "bfloat16", False),
        (1e39, np.float64, "float32", False),
    ],
)
def test_overflow_is_refused_by_name_and_value(tmp_path, value, source, dtype, fits):
    array = np.ones((24, 24), source)
    array[20, 3] = value
    if fits:
        write(tmp_path / "m", dtype, changes={NAME: array})
        assert np.isfinite(load(tmp_path / "m", "float32").params[NAME]).all()
    else:
        with pytest.raises(CheckpointError, match=rf"^{NAME}: the value at \[20, 3\] is .*too large for {dtype}$") as error:
            write(tmp_path / "m", dtype, changes={NAME: array})
        assert str(source(value)) in str(error.value)
        assert not list(tmp_path.iterdir())


def test_overflow_of_bfloat16_bits_into_float16_is_refused(tmp_path):
    bits = to_bfloat16(np.full((24, 24), 1e5, np.float32))
    with pytest.raises(CheckpointError, match=rf"^{NAME}: the value at \[0, 0\] is 99840.0, too large for float16$"):
        write(tmp_path / "m", "float16", changes={NAME: bits})


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path, source, value):
    array = np.ones((24, 24), "float32" if source == "bfloat16" else source)
    array[22, 1] = value
    array = to_bfloat16(array) if source == "bfloat16" else array
    with pytest.raises(CheckpointError, match=rf"^{NAME}: the value at \[22, 1\] is {value}, which is not finite$"):
        write(tmp_path / "m", "bfloat16", changes={NAME: array})
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("change", ["missing", "unknown", "misshapen", "integers", "twice", "too few rows", "too many rows"])
def test_a_wrong_parameter_is_refused_by_name(tmp_path, change):
    params = tiny.random_params(CONFIG, seed=1)
    expected = {
        "missing": f"the model: {NAME} is missing",
        "unknown": "layers.1.attention.wq.weight is not a parameter of this model",
        "misshapen": rf"{NAME} is \[24, 23\], expected \[24, 24\]",
        "integers": f"{NAME} is int32, expected float16",
        "twice": f"{NAME} is there twice",
        "too few rows": f"{NAME} has 23 rows, expected 24",
        "too many rows": rf"{NAME}: rows \[1, 24\] after 24 others",
    }[change]

    def fill(writer):
        for name, array in params.items():
            if name != NAME:
                writer.add(name, array)
        array = params[NAME]
        if change == "unknown":
            writer.add("layers.1.attention.wq.weight", array)
        if change == "misshapen":
            writer.add(NAME, array[:, 1:])
        if change == "integers":
            writer.add(NAME, array.astype(np.int32))
        if change == "twice":
            writer.add(NAME, array)
            writer.add(NAME, array)
        if change == "too few rows":
            writer.add_blocks(NAME, [array[:23]])
        if change == "too many rows":
            writer.add_blocks(NAME, [array, array[:1]])

    with (
        pytest.raises(CheckpointError, match=expected),
        checkpoint.create(tmp_path / "m", CONFIG, "float32", {}) as writer,
    ):
        fill(writer)
    assert not list(tmp_path.iterdir())


def test_files_are_stored_unchanged_and_settings_come_back(tmp_path):
    content = bytes(range(256))
    (tmp_path / "t").write_bytes(content)
    settings = {"chat_format": "llama3", "system": "Be kind.", "temperature": 0.6, "top_p": 0.9}
    write(tmp_path / "m", files=[("tokenizer.model", tmp_path / "t"), ("notes.txt", b"hello")], generation=settings)
    model = open_model(tmp_path / "m")
    assert model.generation == settings
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == content
    assert model.manifest["source"] == {"kind": "test"}
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "..", "", "x.npy", "manifest.json", "a\\b", "c:x"])
def test_a_file_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="expected a new plain file name"):
        write(tmp_path / "m", files=[(name, b"")])
    assert not list(tmp_path.iterdir())


def test_missing_parents_are_made_and_vanish_with_a_failure(tmp_path):
    with pytest.raises(CheckpointError):
        write(tmp_path / "a" / "b" / "m", changes={NAME: np.ones(3)})
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a" / "b" / "m")
    assert verify(tmp_path / "a" / "b" / "m") == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, end):
    def interrupt(n_bytes):
        raise end

    with pytest.raises(end), checkpoint.create(tmp_path / "m", CONFIG, "float32", {}) as writer:  # noqa: PT012
        writer.progress = interrupt
        writer.add(NAME, np.ones((24, 24), np.float32))
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_replaced_only_by_force(tmp_path):
    write(tmp_path / "m", "float32")
    with pytest.raises(FolderError, match=r"m exists: choose another name, or replace it with --force$"):
        write(tmp_path / "m", "float16")
    assert open_model(tmp_path / "m").manifest["dtype"] == "float32"
    write(tmp_path / "m", "float16", force=True)
    assert open_model(tmp_path / "m").manifest["dtype"] == "float16"
    assert left_next_to(tmp_path / "m") == []


def test_force_takes_an_empty_folder(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(FolderError, match="exists"):
        write(tmp_path / "m")
    write(tmp_path / "m", force=True)
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize("hidden", [".git/HEAD", ".notes", ".empty/", "folder/", "norm.weight.npy.orig", "norm.weight.npy/x"])
def test_force_keeps_what_is_hidden_too(tmp_path, hidden):
    write(tmp_path / "m", "float16")
    precious = tmp_path / "m" / hidden
    if hidden.startswith("norm.weight.npy/"):
        precious.parent.unlink()
    (precious if hidden.endswith("/") else precious.parent).mkdir(exist_ok=True)
    if not hidden.endswith("/"):
        precious.write_text("precious")
    with pytest.raises(FolderError, match=rf"m is not replaced: it holds {hidden.split('/')[0]}, "):
        write(tmp_path / "m", force=True)
    with pytest.raises(FolderError, match="is not replaced"):
        checkpoint.check_free(tmp_path / "m", force=True)
    assert precious.exists()
    assert left_next_to(tmp_path / "m") == []


def test_a_file_too_large_for_the_system_is_named(tmp_path):
    with full_disk(1000), pytest.raises(OSError, match="File too large") as raised:
        write(tmp_path / "m", changes={})
    assert raised.value.filename == str(tmp_path / "m" / "tok_embeddings.weight.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("foreign", ["a folder", "another manifest", "a model and a note", "a file"])
def test_force_never_destroys_what_is_not_ours(tmp_path, foreign):
    target = tmp_path / "m"
    if foreign == "a file":
        target.write_text("precious")
    else:
        if foreign == "a model and a note":
            write(target)
        else:
            target.mkdir()
        (target / "thesis.txt").write_text("precious")
        if foreign == "another manifest":
            (target / "manifest.json").write_text('{"name": "a web app"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FolderError, match=r"is a file|is not replaced"):
        write(target, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_force_with_a_failure_keeps_the_old_model(tmp_path):
    write(tmp_path / "m", "float16")
    with pytest.raises(CheckpointError):
        write(tmp_path / "m", force=True, changes={NAME: np.ones(3)})
    assert verify(tmp_path / "m") == []
    assert left_next_to(tmp_path / "m") == []


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_keeps_the_old_model(tmp_path, monkeypatch, failing):
    write(tmp_path / "m", "float16")
    calls, rename = [], Path.rename

    def fail(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise PermissionError(errno.EPERM, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        write(tmp_path / "m", force=True)
    assert open_model(tmp_path / "m").manifest["dtype"] == "float16"
    assert left_next_to(tmp_path / "m") == []


def test_too_little_disk_is_said_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = sum(4 * np.prod(shape) + 128 for shape in parameter_shapes(CONFIG).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with (
        pytest.raises(CheckpointError, match=r"m: the model needs [\d.]+ kB, but only [\d.]+ kB are free on that disk$"),
        checkpoint.create(tmp_path / "m", CONFIG, "float32", {}),
    ):
        pytest.fail("writing began")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    write(tmp_path / "m")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "to_storage", fail)
    with pytest.raises(CheckpointError, match=r"m: the disk is full; the model needs [\d.]+ kB\. Nothing was left behind$"):
        write(tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no program mount")
def test_a_really_full_disk(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1 << 40))  # as another process may fill it meanwhile
        with pytest.raises(CheckpointError, match="the disk is full"):
            write(tmp_path / "m")
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("tensor", [1, 6])
def test_a_folder_that_is_replaced_while_it_is_opened(tmp_path, tensor, monkeypatch):
    """Detect a mixture of two models, whose files all have the same names and sizes."""
    write(tmp_path / "m")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(CONFIG).items()}
    original, calls = reading.map_array, []

    def replacing(*args):
        calls.append(args)
        if len(calls) == tensor:
            write(tmp_path / "m", changes=zeros, force=True)
        return original(*args)

    monkeypatch.setattr(reading, "map_array", replacing)
    model = open_model(tmp_path / "m")
    assert not any(array.any() for array in model.params.values())
    assert len(calls) > len(model.params)


# ------------------------------------------------------------------------------------------------------- killed at any moment

SLOW_WRITER = """
    import os, signal, sys, time
    from pathlib import Path
    from npllama.checkpoint import atomic, writing
    from killed import write_model
    moment, target, force = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "force"
    def wait():
        print("now", flush=True)
        time.sleep(60)
    def before(module, name, nth):
        original, count = getattr(module, name), [0]
        def call(*args, **options):
            count[0] += 1
            if count[0] == nth:
                wait()
            return original(*args, **options)
        setattr(module, name, call)
    places = {
        "made": (writing.Writer, "add", 1),
        "written": (writing, "to_storage", 7),
        "complete": (atomic, "put_in_place", 1),
        "between": (Path, "rename", 2),
        "replaced": (Path, "rename", 3),
    }
    before(*places[moment])
    write_model(target, "float32", force=force)
"""


def start_writer(moment: str, target: Path, force: bool = False) -> subprocess.Popen:
    """Start a process that runs to this point of its work and waits there."""
    code = textwrap.dedent(SLOW_WRITER)
    command = [sys.executable, "-c", code, moment, str(target), "force" if force else "-"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests" / "helpers", preexec_fn=hear_signals
    )
    assert process.stdout.readline() == "now\n"
    return process


def end(process: subprocess.Popen, number: int) -> int:
    process.send_signal(number)
    process.stdout.close()
    try:
        return process.wait(timeout=30)
    finally:  # also when it has not ended
        process.kill()
        process.wait()


@pytest.mark.parametrize("moment", ["made", "written", "complete"])
def test_killed_without_a_warning_no_target_appears_and_the_next_run_cleans_up(tmp_path, moment):
    process = start_writer(moment, tmp_path / "m")
    at_work = left_next_to(tmp_path / "m")
    with pytest.raises(FolderError, match=r"m: another run is writing it$"):  # a live run is left alone
        write(tmp_path / "m")
    assert left_next_to(tmp_path / "m") == at_work
    end(process, signal.SIGKILL)
    assert not (tmp_path / "m").exists()
    assert left_next_to(tmp_path / "m") == at_work
    with pytest.raises(CheckpointError, match="not found"):
        open_model(tmp_path / "m")
    write(tmp_path / "m")
    assert left_next_to(tmp_path / "m") == []
    assert verify(tmp_path / "m") == []


def test_leftovers_of_other_targets_are_left_alone(tmp_path):
    end(start_writer("written", tmp_path / "m2"), signal.SIGKILL)
    (tmp_path / ".m.partial-notours").mkdir()
    before = left_next_to(tmp_path / "m")
    write(tmp_path / "m")
    assert left_next_to(tmp_path / "m") == before


@pytest.mark.parametrize("moment", ["made", "written", "complete", "between", "replaced"])
def test_killed_while_replacing_one_of_the_two_models_always_opens(tmp_path, moment):
    write(tmp_path / "m", "float16")
    end(start_writer(moment, tmp_path / "m", force=True), signal.SIGKILL)
    expected = "float32" if moment == "replaced" else "float16"
    assert open_model(tmp_path / "m").manifest["dtype"] == expected
    assert verify(tmp_path / "m") == []
    with pytest.raises(FolderError, match="exists"):  # without force: what the dead run left half done is put right, no more
        write(tmp_path / "m", "bfloat16")
    assert left_next_to(tmp_path / "m") == []
    assert open_model(tmp_path / "m").manifest["dtype"] == expected
    write(tmp_path / "m", "bfloat16", force=True)
    assert open_model(tmp_path / "m").manifest["dtype"] == "bfloat16"
    assert left_next_to(tmp_path / "m") == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_that_asks_leaves_nothing(tmp_path, name):
    process = start_writer("written", tmp_path / "m")
    process.stderr = None
    assert end(process, getattr(signal, name)) != 0
    assert not list(tmp_path.iterdir())


def test_where_files_can_not_be_locked_age_tells_a_dead_run(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    partial = tmp_path / ".m.partial-0123abcd"
    partial.mkdir()
    (partial / "x").touch()
    with pytest.raises(FolderError, match=r"m: another run is writing it, into \.m\.partial-0123abcd$"):
        write(tmp_path / "m")
    assert left_next_to(tmp_path / "m") == [partial.name]
    long_ago = time.time() - 2 * atomic.DEAD_AFTER_SECONDS
    for path in (partial / "x", partial):
        os.utime(path, (long_ago, long_ago))
    write(tmp_path / "m")
    assert left_next_to(tmp_path / "m") == []


# ----------------------------------------------------------------------------------------------------------------- reading


def test_float32_comes_back_bit_for_bit_and_stays_on_disk(tmp_path, caplog):
    params = write(tmp_path / "m")
    model = load(tmp_path / "m", "stored")
    assert model.config == CONFIG
    assert model.tokenizer is None
    assert not caplog.records
    assert list(model.params) == list(parameter_shapes(CONFIG))
    for name, array in model.params.items():
        assert np.array_equal(array, params[name])
        assert type(array) is np.ndarray
        assert isinstance(array.base, np.memmap) == (sys.byteorder == "little")  # files are; elsewhere numbers are swapped
        assert not (array.flags.writeable and isinstance(array.base, np.memmap))


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_npy_opens_in_any_tool_and_the_manifest_says_what_it_is(tmp_path, storage):
    write(tmp_path / "m", storage)
    array = np.load(tmp_path / "m" / f"{NAME}.npy", mmap_mode="r", allow_pickle=False)
    entry = json.loads((tmp_path / "m" / "manifest.json").read_text())["tensors"][NAME]
    assert array.dtype == np.dtype("uint16" if storage == "bfloat16" else storage).newbyteorder("<")
    assert (entry["dtype"], entry["shape"]) == (storage, list(array.shape))


@pytest.mark.parametrize("storage", checkpoint.STORAGE)
def test_arrays_of_either_byte_order_make_the_same_files(tmp_path, storage):
    dtypes = {name: "float32" if storage == "int8" and not checkpoint.takes_int8(name) else storage for name in SHAPES}
    params = write(tmp_path / "m", dtypes)
    write(tmp_path / "other", dtypes, changes={name: tiny.byte_swapped(x) for name, x in params.items()})
    for file in sorted((tmp_path / "m").iterdir()):
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("source", ["<u2", ">u2", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
def test_every_source_of_either_byte_order_is_written_as_its_header_says(tmp_path, source, storage):
    x = np.array([[0, 1, -2.5], [0.15625, 3, -1e-3]], np.float32)
    given = to_bfloat16(x) if source[1:] == "u2" else x
    header = checkpoint.STORAGE[storage]
    shape = (2, 3)
    with ThreadPoolExecutor(1) as hashing:
        writer = checkpoint.Writer(tmp_path, tmp_path, {NAME: shape}, {NAME: storage}, hashing)
        writer.add(NAME, given.astype(source))
    found = np.load(tmp_path / f"{NAME}.npy", allow_pickle=False)
    value = widen(given if given.dtype == np.uint16 else given.astype(source[1:]))
    expected = to_bfloat16(value) if storage == "bfloat16" else value.astype(storage)
    assert found.dtype == header
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("storage", checkpoint.STORAGE)
@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_a_machine_whose_byte_order_is_not_the_files(tmp_path, monkeypatch, storage, dtype):
    """Read files of the other byte order: written as the header says, native once opened."""
    dtypes = {name: "float32" if storage == "int8" and not checkpoint.takes_int8(name) else storage for name in SHAPES}
    write(tmp_path / "here", dtypes)
    swapped = {name: known.newbyteorder("S") for name, known in checkpoint.STORAGE.items()}
    for name, known in swapped.items():
        monkeypatch.setitem(checkpoint.STORAGE, name, known)
    write(tmp_path / "there", dtypes)
    assert verify(tmp_path / "there") == []
    file = np.load(tmp_path / "there" / f"{NAME}.npy", allow_pickle=False)
    assert file.dtype == swapped[dtypes[NAME]]
    found = load(tmp_path / "there", dtype).params
    monkeypatch.undo()
    for name, expected in load(tmp_path / "here", dtype).params.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(widen(found[name]), widen(expected))


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["stored", "float32", "float64"])
def test_dtypes_of_loading(tmp_path, storage, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    write(tmp_path / "m", storage)
    packed, model = open_model(tmp_path / "m").params, load(tmp_path / "m", dtype)
    for name, array in model.params.items():
        bits = packed[name]
        exact = bits.view(ml_dtypes.bfloat16) if storage == "bfloat16" else bits
        if dtype == "stored" and array.ndim == 2:
            assert array.dtype == bits.dtype
            assert np.array_equal(array, bits)
        else:
            assert array.dtype == ("float32" if dtype == "stored" else dtype)
            assert np.array_equal(array, exact.astype(array.dtype))


def test_auto_widens_only_into_half_of_the_free_memory(tmp_path, monkeypatch):
    write(tmp_path / "m", "bfloat16")
    needed = sum(4 * int(np.prod(shape)) for shape in parameter_shapes(CONFIG).values())
    monkeypatch.setattr(reading, "available_memory", lambda: 2 * needed)
    assert load(tmp_path / "m").params[NAME].dtype == np.float32
    monkeypatch.setattr(reading, "available_memory", lambda: 2 * needed - 2)
    model = load(tmp_path / "m")
    assert model.params[NAME].dtype == np.uint16
    assert model.params["norm.weight"].dtype == np.float32


def test_tied_embeddings_are_stored_once(tmp_path):
    config = tiny.config(n_layers=1, tied_embeddings=True)
    write(tmp_path / "m", config=config)
    assert "output.weight" not in load(tmp_path / "m").params
    assert not (tmp_path / "m" / "output.weight.npy").exists()


def test_unknown_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'float8', expected auto"):
        load(tmp_path, "float8")
    with pytest.raises(CheckpointError, match="dtype is 'float8', expected float32"):
        write(tmp_path / "m", "float8")


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_entry(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"][NAME] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_tensor(folder: Path, array: np.ndarray) -> None:
    """Write another array to the file, and its size to the manifest."""
    np.save(folder / f"{NAME}.npy", array, allow_pickle=True)
    edit_entry(folder, bytes=(folder / f"{NAME}.npy").stat().st_size)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


BAD = {
    "no folder": (lambda m: shutil.rmtree(m), r"m: not found, expected a model directory$"),
    "a file": (
        lambda m: (shutil.rmtree(m), m.write_text("")),
        r"m: a file, expected a model directory \(npllama convert makes",
    ),
    "no manifest": (
        lambda m: (m / "manifest.json").unlink(),
        r"m is not a model directory: it has no manifest\.json \(",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), r"config\.json is missing$"),
    "no tensor": (lambda m: (m / f"{NAME}.npy").unlink(), rf"{NAME}\.npy is missing$"),
    "no other file": (lambda m: (m / "tokenizer.model").unlink(), r"tokenizer\.model is missing$"),
    "manifest a folder": (
        lambda m: ((m / "manifest.json").unlink(), (m / "manifest.json").mkdir()),
        r"manifest\.json is a folder, expected a file$",
    ),
    "manifest not JSON": (lambda m: (m / "manifest.json").write_text("{"), r"manifest\.json is not JSON: "),
    "manifest deeply nested": (lambda m: (m / "manifest.json").write_text("[" * 10**6), r"manifest\.json is not JSON: "),
    "manifest a list": (
        lambda m: (m / "manifest.json").write_text("[]"),
        r"manifest\.json holds list, expected a JSON object$",
    ),
    "newer": (
        lambda m: edit_json(m / "manifest.json", npllama_format=3),
        r"has format version 3, .* reads up to 2: upgrade npllama$",
    ),
    "not ours": (lambda m: edit_json(m / "manifest.json", npllama_format="x"), r"is not npllama's: npllama_format is 'x'$"),
    "no tensors": (
        lambda m: edit_json(m / "manifest.json", tensors=[]),
        r"manifest\.json: tensors is list, expected an object$",
    ),
    "bad entry": (lambda m: edit_entry(m, bytes="12"), rf"manifest\.json: tensors: '{NAME}': expected an object with file, "),
    "traversal": (lambda m: edit_entry(m, file="../secret.npy"), rf"'{NAME}' names a file outside the directory$"),
    "absolute": (lambda m: edit_entry(m, file="/etc/passwd"), rf"'{NAME}' names a file outside the directory$"),
    "odd dtype": (
        lambda m: edit_entry(m, dtype="float8"),
        rf"{NAME} has dtype 'float8', expected float32, float16, bfloat16, int8$",
    ),
    "odd shape": (lambda m: edit_entry(m, shape=[24, "x"]), rf"{NAME} is \[24, 'x'\], expected \[24, 24\] by config\.json$"),
    "truncated": (lambda m: truncate(m / f"{NAME}.npy"), rf"{NAME}\.npy is 2,431 bytes, expected 2,432$"),
    "other shape": (
        lambda m: replace_tensor(m, np.ones((12, 48), "<f4")),
        rf"{NAME}\.npy holds float32 \[12, 48\], expected float32 \[24, 24\]$",
    ),
    "other dtype": (
        lambda m: replace_tensor(m, np.ones((24, 24), "<i4")),
        rf"{NAME}\.npy holds int32 \[24, 24\], expected float32 \[24, 24\]$",
    ),
    "big-endian": (
        lambda m: replace_tensor(m, np.ones((24, 24), ">f4")),
        rf"{NAME}\.npy holds big-endian float32 \[24, 24\], expected float32 \[24, 24\]$",
    ),
    "columns first": (
        lambda m: replace_tensor(m, np.asfortranarray(np.ones((24, 24), "<f4"))),
        rf"{NAME}\.npy holds float32 \[24, 24\] in Fortran order, expected float32 \[24, 24\]$",
    ),
    "pickle": (
        lambda m: replace_tensor(m, np.array([[print] * 24] * 24, object)),
        rf"{NAME}\.npy is not a NumPy array file: ",
    ),
    "not npy": (
        lambda m: (m / f"{NAME}.npy").write_bytes(b"x" * 2432),
        rf"{NAME}\.npy is not a NumPy array file: ",
    ),
    "odd header": (
        lambda m: (m / f"{NAME}.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr': (((" + b" " * 2409),
        rf"{NAME}\.npy is not a NumPy array file: ",
    ),
    "config nonsense": (
        lambda m: edit_json(m / "config.json", dim=-1),
        r"config\.json: dim is -1, expected a positive whole number$",
    ),
    "config incomplete": (lambda m: (m / "config.json").write_text("{}"), r"config\.json: missing dim, "),
    "config unknown": (lambda m: edit_json(m / "config.json", experts=8), r"config\.json: unknown experts$"),
    "config of another": (lambda m: edit_json(m / "config.json", ffn_dim=41), r"w1\.weight is \[40, 24\], expected \[41, 24\]"),
    "top_p of 0": (
        lambda m: edit_json(m / "config.json", generation={"top_p": 0}),
        r"config\.json: generation: top_p is 0, expected a number above 0 and up to 1$",
    ),
    "an endless temperature": (
        lambda m: edit_json(m / "config.json", generation={"temperature": 10**400}),
        r"config\.json: generation: temperature is inf, expected a number from 0$",
    ),
    "an endless width": (
        lambda m: edit_json(m / "config.json", dim=10**400),
        r"config\.json: dim is inf, expected a positive whole number$",
    ),
    "a width beyond counting": (
        lambda m: edit_json(m / "config.json", dim=2**31),
        r"config\.json: dim is 2147483648, expected a positive whole number up to 2147483647$",
    ),
    "the smallest theta": (
        lambda m: edit_json(m / "config.json", rope_theta=5e-324),
        r"config\.json: rope_theta is 5e-324, expected a positive number from 1e-12 to 1e\+15$",
    ),
    "the largest theta": (
        lambda m: edit_json(m / "config.json", rope_theta=1e308),
        r"config\.json: rope_theta is 1e\+308, expected a positive number from 1e-12 to 1e\+15$",
    ),
    "endless layers": (
        lambda m: edit_json(m / "config.json", n_layers=2**31 - 1),
        r"n_layers is 2147483647, manifest\.json lists 12 tensors$",
    ),
    "more layers": (
        lambda m: edit_json(m / "config.json", n_layers=2),
        r"manifest\.json: layers\.1\..* and 6 more are missing$",
    ),
    "tied": (lambda m: edit_json(m / "config.json", tied_embeddings=True), r"manifest\.json: output\.weight is unexpected$"),
    "settings": (
        lambda m: edit_json(m / "config.json", generation={"top_p": 7}),
        r"config\.json: generation: top_p is 7, expected",
    ),
    "settings of no kind": (
        lambda m: edit_json(m / "config.json", generation=[1]),
        r"config\.json: generation is \[1\], expected",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_has_its_line(tmp_path, fault):
    spoil, expected = BAD[fault]
    write(tmp_path / "m", files=[("tokenizer.model", b"x")])
    spoil(tmp_path / "m")
    with pytest.raises(CheckpointError, match=expected) as error:
        open_model(tmp_path / "m")
    assert "\n" not in str(error.value)
    with contextlib.suppress(CheckpointError):
        assert verify(tmp_path / "m") != []


def test_verify_finds_what_opening_can_not(tmp_path):
    folder = tmp_path / "m"
    write(folder, files=[("tokenizer.model", b"abc")])
    (folder / "README.md").write_text("not listed, and welcome")
    seen = []
    assert verify(folder, lambda done, total: seen.append((done, total))) == []
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (
        seen[-1][0]
        == seen[-1][1]
        == sum(p.stat().st_size for p in folder.iterdir())
        - sum((folder / name).stat().st_size for name in ("README.md", "manifest.json"))
    )

    file = folder / f"{NAME}.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (folder / "tokenizer.model").write_bytes(b"abd")
    np.save(folder / "layers.7.npy", np.ones(1))
    open_model(folder)
    problems = verify(folder)
    assert len(problems) == 3
    for problem, name in zip(
        problems, (f"{NAME}.npy is altered", "tokenizer.model is altered", "layers.7.npy is not in"), strict=True
    ):
        assert name in problem


def test_more_tensors_than_the_limit_of_open_files(tmp_path):
    pytest.importorskip("resource", reason="there is no such limit on this system")
    config = tiny.config(dim=8, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=4, vocab_size=5, n_layers=20)
    write(tmp_path / "m", config=config)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from npllama.checkpoint import load
print(len(load(sys.argv[1]).params))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "183\n"


def test_an_error_is_one_line_whatever_a_file_is_called():
    assert str(CheckpointError("a\nb\x1b[31m\u2028é")) == r"a\nb\x1b[31m\u2028é"
