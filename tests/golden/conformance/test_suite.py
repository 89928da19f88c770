"""Check the suite as files: complete, the same bytes each time, small, and refused when a byte changed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct

import numpy as np
import pytest

from npllama.golden.conformance import operations
from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.suite import FORMAT, FORMATS, VERSION, SuiteError, built_in, export, read_array, read_suite

from commands import fails
from system import full_disk


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(quick_conversion):
    """Skip waiting for the disk: each export writes hundreds of small files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("conformance") / "vectors"
    export(path)
    return path


@pytest.mark.parametrize("storage", FORMATS)
def test_what_is_written_is_what_is_computed(storage, tmp_path):
    levels = None if storage == "raw" else ["L1"]
    files = export(tmp_path / "v", levels, storage)
    found = read_suite(tmp_path / "v")
    assert [case.path for case in found] == [path for path, case in cases().items() if not levels or case.level in levels]
    for mine, theirs in zip(built_in(levels), found, strict=True):
        assert theirs.tolerances == mine.tolerances
        assert theirs.catches == mine.catches
        for name, y in mine.outputs.items():
            assert np.array_equal(theirs.outputs[name], y, equal_nan=True)
    assert export(tmp_path / "v", levels, storage, force=True) == files
    assert {file.relative_to(tmp_path / "v").as_posix() for file in (tmp_path / "v").rglob("*") if file.is_file()} == {
        *files,
        "suite.json",
    }


def test_every_operation_has_its_source():
    assert operations.SOURCES.keys() == operations.OPERATIONS.keys()


def test_a_case_is_plain_files(folder):
    at = folder / "L1" / "rms_norm" / "small_rows"
    content = json.loads((at / "case.json").read_text(encoding="utf-8"))
    assert content["signature"] == "rms_norm(x, weight, eps) -> y"
    assert content["constants"] == {"eps": 1e-5}
    assert content["inputs"]["x"] == {"dtype": "float32", "shape": [5, 80], "file": "x.f32"}
    assert content["outputs"]["y"]["tolerance"].keys() >= {"float32", "bfloat16", "float16", "int8-activations"}
    assert "eps is added after the square root" in content["catches"]["eps_outside_root"]
    assert "mean(x²)" in content["formula"]
    assert content["source"] == "Zhang & Sennrich 2019, arXiv:1910.07467"
    x, weight = np.fromfile(at / "x.f32", "<f4").reshape(5, 80), np.fromfile(at / "weight.f32", "<f4")
    y = x.astype(float) / np.sqrt(np.mean(x.astype(float) ** 2, axis=-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(np.fromfile(at / "y.f64", "<f8").reshape(5, 80), y, rtol=1e-13)
    lines = (folder / "L1.txt").read_text().splitlines()
    assert lines[0] == "L1/embed/rows embed tokens.i64[5] weight.f32[11,80] -> y[5,80]"
    assert "L1/rms_norm/small_rows rms_norm x.f32[5,80] weight.f32[80] eps=1e-05 -> y[5,80]" in lines


def test_every_input_is_where_case_json_says(folder):
    for path, case in cases().items():
        content = json.loads((folder / path / "case.json").read_text(encoding="utf-8"))
        assert content["inputs"].keys() == case.arrays.keys()
        for name, facts in content["inputs"].items():
            found = (folder / path / facts["file"]).resolve().read_bytes()
            assert found == case.arrays[name].astype(case.arrays[name].dtype.newbyteorder("<")).tobytes()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, capsys):
    with full_disk(1000):
        line = fails(capsys, "conformance", "export", tmp_path / "v")
    assert re.fullmatch(rf"npllama conformance: {tmp_path}/v/L\d/[\w/.]+: File too large", line)
    assert list(tmp_path.iterdir()) == []


def test_npy_files_open_in_numpy(tmp_path):
    export(tmp_path / "v", ["L1"], "npy")
    for case in (case for case in cases().values() if case.level == "L1"):
        for name, x in case.arrays.items():
            found = np.load(tmp_path / "v" / case.path / f"{name}.npy", allow_pickle=False)
            assert found.dtype == x.dtype
            assert np.array_equal(found, x, equal_nan=x.dtype.kind == "f")


def test_safetensors_files_open_in_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    export(tmp_path / "v", ["L1"], "safetensors")
    case = cases()["L1/linear_int8/rows"]
    found = library.load_file(tmp_path / "v" / case.path / "inputs.safetensors")
    assert all(np.array_equal(found[name], x) and found[name].dtype == x.dtype for name, x in case.arrays.items())


def test_all_of_it_is_at_most_5_megabytes(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 5_000_000


def test_the_inputs_have_one_hash_whatever_the_form(tmp_path):
    export(tmp_path / "v", ["L1"], "npy")
    export(tmp_path / "w", ["L1"], "raw")
    mine, theirs = (json.loads((path / "suite.json").read_text()) for path in (tmp_path / "v", tmp_path / "w"))
    assert mine["inputs_sha256"] == theirs["inputs_sha256"]
    text = "".join(f"{path} {cases()[path].sha256()}\n" for path in mine["cases"])
    assert mine["inputs_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert mine["version"] == VERSION


def test_a_changed_byte_is_refused(tmp_path):
    export(tmp_path / "v", ["L1"])
    file = tmp_path / "v" / "L1" / "softmax" / "large" / "y.f64"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(SuiteError, match=r"y\.f64 does not match its sha256 in suite\.json"):
        read_suite(tmp_path / "v")


def test_a_folder_that_is_no_suite_is_refused_and_kept(tmp_path, capsys):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine.txt").write_text("mine")
    assert "suite.json is missing" in fails(capsys, "conformance", "export", tmp_path / "v", "--force")
    assert (tmp_path / "v" / "mine.txt").exists()
    (tmp_path / "v" / "suite.json").write_text('{"format": "another"}')
    with pytest.raises(SuiteError, match="format is 'another', expected 'npllama conformance 1'"):
        read_suite(tmp_path / "v")
    (tmp_path / "v" / "suite.json").write_text('{"format": "npllama conformance 1", "cases": ["L1/a"], "files": {}}')
    with pytest.raises(SuiteError, match=r"has the case 'L1/a' without its case\.json"):
        read_suite(tmp_path / "v")


def test_a_file_outside_of_the_folder_is_refused(tmp_path):
    (tmp_path / "suite.json").write_text('{"format": "npllama conformance 1", "cases": [], "files": {"../x": "0"}}')
    with pytest.raises(SuiteError, match=r"names '\.\./x', expected files inside the folder"):
        read_suite(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"operation": 5}, "ValueError operation, purpose or catches is not text"),
        ({"catches": {"eps_left_out": None}}, "ValueError operation, purpose or catches is not text"),
        ({"catches": 3}, "TypeError "),
        ({"outputs": {"y": {"shape": [-1], "tolerance": {}}}}, "ValueError a shape is not one"),
        ({"outputs": {"y": {"shape": [], "tolerance": {"float32": {"max": math.inf, "rms": 1}}}}}, "a tolerance is inf and 1"),
        ({"outputs": {"y": {"shape": [], "tolerance": {"float32": {"max": 1, "rms": math.nan}}}}}, "a tolerance is 1 and nan"),
        ({"outputs": {"y": {"shape": [], "tolerance": {"float32": {"max": "1", "rms": 1}}}}}, "TypeError "),
        ({"outputs": {"y": {"shape": [], "tolerance": {"float32": {"max": 1}}}}}, "TypeError "),
    ],
)
def test_a_case_that_is_none_is_refused(changes, expected, tmp_path):
    """Check in particular that no tolerance lets everything pass."""
    case = {"operation": "softmax", "purpose": "p", "catches": {}, "outputs": {}} | changes
    data = json.dumps(case).encode()
    (tmp_path / "L1").mkdir()
    (tmp_path / "L1" / "case.json").write_bytes(data)
    contents = {"format": FORMAT, "cases": ["L1"], "files": {"L1/case.json": hashlib.sha256(data).hexdigest()}}
    (tmp_path / "suite.json").write_text(json.dumps(contents))
    with pytest.raises(SuiteError, match=f"case.json: not a case of '{FORMAT}': .*{expected}"):
        read_suite(tmp_path)


def test_results_are_read_in_every_form(tmp_path):
    y = np.array([[1.5, -2.0]])
    y.astype("<f4").tofile(tmp_path / "a.f32")
    y.astype("<f8").tofile(tmp_path / "b.f64")
    np.save(tmp_path / "c.npy", (y.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))  # bfloat16
    header = b'{"d":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    (tmp_path / "outputs.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + y.astype("<f4").tobytes())
    for name in "abcd":
        assert np.array_equal(read_array(tmp_path, name, (1, 2)), y), name
    assert read_array(tmp_path, "e", (1, 2)) is None
    with pytest.raises(SuiteError, match=r"a\.f32: 8 bytes, expected 12 for shape \[3\]"):
        read_array(tmp_path, "a", (3,))
