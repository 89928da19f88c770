"""Readers of other programs' files: whatever a file holds, they return an array or raise one line that names it."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import threading
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint import foreign
from npllama.errors import shown


class Refused(ValueError):
    """The caller's own error."""


def refused(read, path: Path, expected: str, *arguments) -> None:
    with pytest.raises(Refused, match=expected) as error:
        read(path, *arguments, Refused)
    line = str(error.value)
    assert line.startswith(str(path))
    assert line.isprintable()
    assert len(line) < 400


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------------------ JSON


BAD_JSON = {
    "empty": (b"", r" is not JSON: "),
    "a list": (b"[1]", r" holds list, expected a JSON object$"),
    "not UTF-8": (b'{"a": "\xff"}', r" is not JSON: 'utf-8' codec"),
    "deep": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", r" is not JSON: nested deeper than 100 levels$"),
    "deeper than the parser goes": (b"[" * 10**6, r" is not JSON: nested deeper than 100 levels$"),
    "ambiguous": (b'{"a": {"dim": 1, "dim": 2}}', r" is not JSON: 'dim' is there twice, with different values$"),
    "ambiguous and unprintable": (b'{"\\ud800\\n": 1, "\\ud800\\n": 2}', r" is not JSON: '\\ud800\\n' is there twice"),
    "long": (b'{"a": "' + b"x" * foreign.JSON_LIMIT + b'"}', r" is 4,194,313 bytes, expected at most 4,194,304$"),
}


@pytest.mark.parametrize("fault", BAD_JSON)
def test_json_that_is_refused(fault, tmp_path):
    content, expected = BAD_JSON[fault]
    (tmp_path / "x.json").write_bytes(content)
    refused(foreign.read_json, tmp_path / "x.json", expected)


def test_json_that_is_read(tmp_path):
    huge, large = "1" + "0" * 10**5, "1" + "0" * 99
    text = f'{{"a": NaN, "b": -Infinity, "c": 1e999, "d": {huge}, "e": [{large}], "same": 1, "same": 1}}'
    (tmp_path / "x.json").write_text("\ufeff" + text, encoding="utf-8")
    found = foreign.read_json(tmp_path / "x.json", Refused)
    assert str(found.pop("a")) == "nan"
    assert found == {"b": -np.inf, "c": np.inf, "d": np.inf, "e": [10**99], "same": 1}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no FIFOs")
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "missing", "a NUL in the name"])
@pytest.mark.parametrize("read", [foreign.read_json, foreign.read_npy, foreign.read_npz, foreign.read_safetensors])
def test_what_is_no_regular_file_is_not_read(read, kind, tmp_path):
    path, writer = tmp_path / "x.json", None
    expected = r" is a FIFO, a socket or a device, expected a file$"
    if kind == "FIFO":
        os.mkfifo(path)
        writer = os.open(path, os.O_RDWR)  # without the check, reading would wait until this is closed
        os.write(writer, b'{"a": 1}')
        threading.Timer(2, os.close, [writer]).start()
    elif kind == "device":
        path.symlink_to(os.devnull)  # in place of one without an end
    elif kind == "folder":
        path.mkdir()
        expected = r" is a folder, expected a file$"
    elif kind == "missing":
        expected = r" is missing$"
    else:
        path, expected = tmp_path / "x\0", "null|NUL"
        with pytest.raises(Refused, match=expected):
            read(path, Refused)
        return
    refused(read, path, expected)


@pytest.mark.parametrize("form", ["npy", "safetensors", "raw"])
def test_a_mapping_that_finds_no_address_space(form, tmp_path, monkeypatch):
    """Report that there is no address space; the file itself is right and not called damaged."""

    def full(*args):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    path, array = tmp_path / "x", np.zeros(6, np.float32)
    header = b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}'
    safetensors = struct.pack("<Q", len(header)) + header + array.tobytes()
    path.write_bytes({"npy": npy(array), "safetensors": safetensors, "raw": array.tobytes()}[form])
    monkeypatch.setattr(np, "memmap", full)
    expected = r"x: Cannot allocate memory: 0\.0 kB of address space are needed$"
    read = {"npy": foreign.read_npy, "safetensors": foreign.read_safetensors, "raw": foreign.read_raw}[form]
    refused(read, path, expected, *([(6,)] if form == "raw" else []))


def test_a_value_is_shown_in_one_short_line_whatever_it_is():
    shared: list = []
    for _ in range(60):  # 2**60 lists, written out
        shared = [shared, shared]
    cyclic: dict = {}
    cyclic["self"] = cyclic
    for value in (shared, tuple(shared), cyclic, 10**6000, "x" * 10**6, "a\nb\ud800", np.zeros((99, 99)), {"a": [1, [2, [3]]]}):
        text = shown(value)
        assert len(text) <= 80
        assert text.isprintable()
    assert shown([1, "2", None]) == "[1, '2', None]"
    assert shown(10**400) == "a whole number of 1,329 bits"


# ------------------------------------------------------------------------------------------------------------------ .npy, .npz


def header(text: str, version: bytes = b"\1\0") -> bytes:
    data = text.encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(data)) + data


def described(shape: str, descr: str = "'<f4'") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n") + bytes(64)


BAD_NPY = {
    "empty": (b"", "it is empty$"),
    "text": (b"hello, this is none", "it begins with b'hello,'$"),
    "a zip": (b"PK\3\4" + bytes(60), "it is a zip file, expected .npy"),
    "a later version": (b"\x93NUMPY\3\0" + bytes(60), r"its version is 3\.0, expected 1\.0 or 2\.0$"),
    "a header of gigabytes": (
        header("{}", b"\2\0")[:8] + b"\xff" * 4 + b"{}",
        "its header takes 4,294,967,307 bytes, expected at",
    ),
    "a header that is no Python": (header("{'descr': (((") + bytes(64), "."),
    "a nested header": (header("{'descr': " + "[" * 5000) + bytes(64), "."),
    "a header cut off": (described("(4, 4)")[:40], "."),
    "a shape cut off": (described("(4, 5)"), r"float32 \[4, 5\] takes 80 bytes, but 64 are there: cut off\?$"),
    "a shape that overflows": (described("(4294967296, 4294967296)"), r"takes 73,786,976,294,838,206,464 bytes, but 64"),
    "a negative shape": (described("(-4, -4)"), r"its shape is \(-4, -4\)$"),
    "many axes": (described("(" + "1," * 40 + ")"), "its shape is"),
    "zero times what no array has": (described("(0, 9223372036854775807, 4)"), "."),
    "objects": (npy(np.array([{}], object)), "it holds 'object', expected numbers$"),
    "a record": (described("(4,)", "[('a', '<f4')]"), "expected numbers$"),
    "an array of arrays": (described("(4,)", "('<f4', (2,))"), "."),
    "no bytes": (described("(4,)", "'V0'"), "expected numbers$"),
}


@pytest.mark.parametrize("fault", BAD_NPY)
def test_npy_that_is_refused(fault, tmp_path):
    content, expected = BAD_NPY[fault]
    (tmp_path / "x.npy").write_bytes(content)
    refused(foreign.read_npy, tmp_path / "x.npy", " is not a NumPy array file: .*" + expected)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:  # as a member likewise
        archive.writestr("a.npy", content)
    found = foreign.read_npz(tmp_path / "x.npz", Refused)
    with pytest.raises(Refused, match=r"x\.npz: 'a' is not a NumPy array: .*" + expected):
        found["a"]()


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.float64(3).reshape(()),
    np.zeros((3, 0, 2), np.float16),
    np.arange(3, dtype=">f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_come_back(array, tmp_path):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", a=array)
    np.savez_compressed(tmp_path / "y.npz", a=array)
    found = [foreign.read_npy(tmp_path / "x.npy", Refused)]
    found += [foreign.read_npz(tmp_path / name, Refused)["a"]() for name in ("x.npz", "y.npz")]
    for x in found:
        assert x.shape == array.shape
        assert np.array_equal(x, array)
        assert x.dtype.itemsize == array.dtype.itemsize


def archive_of(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)


GOOD = npy(np.ones(3, np.float32))
BAD_NPZ = {
    "no array": (
        [("a.npy", GOOD), ("README", b"x")],
        zipfile.ZIP_STORED,
        r": 'README' is no array, expected .npy members alone$",
    ),
    "LZMA": ([("a.npy", GOOD)], zipfile.ZIP_LZMA, r": 'a' is compressed by method 14, expected as np\.savez writes it$"),
    "bzip2": ([("a.npy", GOOD)], zipfile.ZIP_BZIP2, r": 'a' is compressed by method 12, expected"),
    "a bomb": (
        [("a.npy", bytes(100 << 20))],
        zipfile.ZIP_DEFLATED,
        r": its .* bytes expand to 104,857,600, more than 100 times",
    ),
}


@pytest.mark.parametrize("fault", BAD_NPZ)
def test_npz_that_is_refused(fault, tmp_path):
    members, method, expected = BAD_NPZ[fault]
    archive_of(tmp_path / "x.npz", members, method)
    tracemalloc.start()
    try:
        refused(foreign.read_npz, tmp_path / "x.npz", expected)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path):
    archive_of(tmp_path / "x.npz", [("a.npy", GOOD), ("a.npy", GOOD)])
    refused(foreign.read_npz, tmp_path / "x.npz", "'a' is there twice$")


def test_an_encrypted_npz_is_refused(tmp_path):
    archive_of(tmp_path / "x.npz", [("a.npy", GOOD)])
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[6] |= 1  # the flag, in the member's header and in the central directory
    data[data.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.npz").write_bytes(data)
    refused(foreign.read_npz, tmp_path / "x.npz", "'a' is encrypted")


def test_a_changed_byte_of_an_npz_is_noticed(tmp_path):
    archive_of(tmp_path / "x.npz", [("a.npy", GOOD)])
    data = (tmp_path / "x.npz").read_bytes().replace(np.float32(1).tobytes(), np.float32(2).tobytes(), 1)
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(Refused, match=r"x\.npz: 'a' is not a NumPy array: Bad CRC-32"):
        foreign.read_npz(tmp_path / "x.npz", Refused)["a"]()


def test_raw_numbers_of_another_size_are_refused(tmp_path):
    np.arange(6, dtype="<f4").tofile(tmp_path / "x.f32")
    assert np.array_equal(foreign.read_raw(tmp_path / "x.f32", (2, 3), Refused), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(Refused, match=r"x\.f32: 24 bytes, expected 28 for shape \[7\] in float32$"):
        foreign.read_raw(tmp_path / "x.f32", (7,), Refused)
    (tmp_path / "x.f32").write_bytes(b"")
    with pytest.raises(Refused, match=r"x\.f32: "):
        foreign.read_raw(tmp_path / "x.f32", (0, 2**62, 2**62), Refused)


# ----------------------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path: Path, **entries: list) -> Path:
    values = {name: {"dtype": kind, "shape": shape, "data_offsets": at} for name, (kind, shape, at) in entries.items()}
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(8, dtype="<f4").tobytes())
    return path


def test_tensors_that_overlap_are_refused(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", a=["F32", [2, 2], [0, 16]], b=["F32", [4], [16, 32]])
    found = foreign.read_safetensors(path, Refused)
    assert {name: x.tolist() for name, x in found.items()} == {"a": [[0, 1], [2, 3]], "b": [4, 5, 6, 7]}
    write_safetensors(path, b=["F32", [4], [16, 32]], empty=["F32", [0], [8, 8]], a=["F32", [5], [0, 20]])
    refused(foreign.read_safetensors, path, "'a' and 'b' overlap, expected bytes of its own for each tensor$")
    write_safetensors(path, a=["F32", [4], [0, 16]], b=["F32", [4], [0, 16]])
    refused(foreign.read_safetensors, path, "'a' and 'b' overlap")
    write_safetensors(path, a=["F32", [0, 2**62, 2**62], [0, 0]])
    refused(foreign.read_safetensors, path, "a has shape ")
