"""Convert arrays to bytes: bare numbers, .npy and .safetensors, each the same bytes on every machine."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

SAFETENSORS = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int8": "I8", "uint16": "BF16"}


def little(x: np.ndarray) -> bytes:
    """Return an array's numbers, in C order and little-endian."""
    return x.astype(x.dtype.newbyteorder("<")).tobytes()


def npy(x: np.ndarray) -> bytes:
    """Return an .npy file, version 1, with a header of 128 bytes."""
    descr = np.lib.format.dtype_to_descr(x.dtype.newbyteorder("<"))
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {x.shape!r}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n" + little(x)


def safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a .safetensors file; uint16 arrays hold bfloat16."""
    header: dict[str, object] = {}
    data, at = [], 0
    for name, x in arrays.items():
        data.append(little(x))
        header[name] = {"dtype": SAFETENSORS[x.dtype.name], "shape": list(x.shape), "data_offsets": [at, at + len(data[-1])]}
        at += len(data[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)
