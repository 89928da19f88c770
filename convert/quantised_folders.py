"""Hugging Face folders whose matrices are quantised already: MLX's, and compressed-tensors' in the format pack-quantized.

Each becomes a Quantised under the name of the plain weight, with the same whole numbers and scales.
Source: mlx.core.quantize; compressed_tensors, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from npllama.checkpoint import CheckpointError
from npllama.config import ConfigError
from npllama.engine.grouped import Grouped, Grouping
from npllama.engine.weights import native
from npllama.errors import shown

Rows = slice | np.ndarray
SCALES = {"e": "float16", "H": "bfloat16", "f": "float32"}  # by dtype.char; bfloat16 is its bits in uint16
INTEGERS: dict[str, np.dtype] = {
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}  # of packed numbers and shapes


@dataclass(frozen=True)
class Quantised:
    """A matrix [out, in] that is quantised already, some of whose rows can be read."""

    shape: tuple[int, ...]
    grouping: Grouping
    rows: Callable[[Rows], Grouped]


Found = Mapping[str, np.ndarray | None]
Unpacked = dict[str, np.ndarray | Quantised | None]
Settings = Mapping[str, object]
Reader = Callable[[object, Settings, Found], Unpacked]


def open_quantised(where: object, values: Mapping[str, object], found: Found) -> Unpacked:
    """Return the tensors with every quantised matrix as one. Raises CheckpointError or ConfigError for what is not read."""
    read, settings = reader_of(values)
    return dict(found) if read is None else read(where, settings, found)


def reader_of(values: Mapping[str, object]) -> tuple[Reader | None, Settings]:
    """Return what reads weights that are quantised as config.json says, and the settings there; None if they are not.

    Raises ConfigError for a way that is not read.
    """
    if isinstance(settings := values.get("quantization"), Mapping):
        return _mlx, settings
    if not isinstance(settings := values.get("quantization_config"), Mapping):
        return None, {}
    if (method := settings.get("quant_method", "an unnamed method")) != "compressed-tensors":
        raise ConfigError(
            f"the weights are quantized by {method!s:.80}, expected float32, float16, bfloat16, MLX or compressed-tensors"
        )
    return _compressed, settings


def _mlx(where: object, settings: Settings, found: Found) -> Unpacked:
    """NAME.weight uint32 [out, in · bits / 32], NAME.scales and NAME.biases [out, groups]: w = scale · q + bias."""
    out: Unpacked = dict(found)
    for name in [name.removesuffix(".scales") for name in found if name.endswith(".scales")]:
        own = settings.get(name, settings)
        if not isinstance(own, Mapping) or own.get("mode", "affine") != "affine":
            raise ConfigError(f"quantization of {name} is {shown(own)}, expected the mode affine")
        bits, group = own.get("bits"), own.get("group_size")
        if bits not in (2, 3, 4, 5, 6, 8) or type(group) is not int or group < 2:
            raise ConfigError(f"quantization of {name} is {shown(own)}, expected 2 to 6 or 8 bits, and a group_size")
        packed, scales, biases = (_taken(where, out, f"{name}.{part}") for part in ("weight", "scales", "biases"))
        out[f"{name}.weight"] = _affine(f"{where}: {name}", packed, scales, biases, bits, group)
    return out


def _taken(where: object, found: Unpacked, name: str) -> np.ndarray:
    array = found.pop(name, None)
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        raise CheckpointError(f"{where}: {name} is {'missing' if array is None else list(array.shape)}, expected a matrix")
    return array


def _affine(
    where: str, packed: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, bits: int, group: int, zero: int = 0
) -> Quantised:
    """Make a matrix of numbers that lie one after the other in words of 32 bits, the lowest bits first."""
    shape = packed.shape[0], packed.shape[1] * 32 // bits
    parts = [scales] if biases is None else [scales, biases]
    for part in parts:
        if part.shape != (shape[0], shape[1] // group) or shape[1] % group or part.dtype != scales.dtype:
            raise CheckpointError(
                f"{where}: {part.dtype} {list(part.shape)} next to scales of {scales.dtype}, expected "
                f"{[shape[0], shape[1] // group]} for {list(shape)} in groups of {group}"
            )
    scale_dtype = SCALES.get(scales.dtype.char)
    if packed.dtype.kind not in "iu" or packed.dtype.itemsize != 4 or scale_dtype is None:
        raise CheckpointError(
            f"{where}: {packed.dtype} with scales of {scales.dtype}, expected whole numbers of 32 bits and floats"
        )
    stored_zero = zero - 128 if bits == 8 else zero  # 0 to 255 are stored as -128 to 127
    try:
        grouping = Grouping(4 if bits <= 4 else 8, group, scale_dtype, biases is not None, stored_zero)
        grouping.check(shape)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None

    def rows(part: Rows) -> Grouped:
        q = unpacked(packed[part], bits)
        if bits > 4:
            q = (q.astype(np.int16) - (128 if bits == 8 else 0)).astype(np.int8)
        return Grouped.of(grouping, q, np.stack([native(x[part]) for x in parts]))

    return Quantised(shape, grouping, rows)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Take numbers out of words, the lowest bits first.    [n, words] of 32 bits -> uint8 [n, words · 32 / bits]"""
    octets = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).view(np.uint8)
    by_bit = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(by_bit, axis=-1, bitorder="little")[..., 0]


def _compressed(where: object, settings: Settings, found: Found) -> Unpacked:
    """NAME.weight_packed int32 [out, in · bits / 32] of q + 2^(bits − 1), NAME.weight_scale [out, groups]: w = scale · q."""
    bits, group = _compressed_settings(settings)
    out: Unpacked = dict(found)
    for name in [name.removesuffix("_packed") for name in found if name.endswith(".weight_packed")]:
        packed, scales = (_taken(where, out, f"{name}_{part}") for part in ("packed", "scale"))
        stated = out.pop(f"{name}_shape", None)
        tensor = _affine(f"{where}: {name}", packed, scales, None, bits, group or packed.shape[1] * 32 // bits, 1 << bits - 1)
        if not isinstance(stated, np.ndarray) or stated.tolist() != list(tensor.shape):
            found_shape = stated.tolist() if isinstance(stated, np.ndarray) else "missing"
            raise CheckpointError(f"{where}: {name}_shape is {found_shape}, expected {list(tensor.shape)}")
        out[name] = tensor
    return out


def _compressed_settings(config: Settings) -> tuple[int, int]:
    """Return the bits, and the size of a group, 0 for whole rows. Raises ConfigError, by name, for what is not read."""
    where = "quantization_config"
    if (form := config.get("format")) != "pack-quantized":
        raise ConfigError(f"{where}: format is {shown(form)}, expected 'pack-quantized'")
    if config.get("kv_cache_scheme") or config.get("sparsity_config"):
        raise ConfigError(f"{where} has a kv_cache_scheme or sparsity_config, which npllama does not compute")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError(f"{where}: config_groups is {shown(groups)}, expected one group")
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping) or scheme.get("input_activations") or scheme.get("output_activations"):
        raise ConfigError(f"{where}: config_groups is {shown(groups)}, expected weights alone to be quantised")
    for key, expected in {"type": ("int",), "symmetric": (True,), "strategy": ("group", "channel"), "num_bits": (4, 8)}.items():
        if weights.get(key) not in expected:
            raise ConfigError(f"{where}: {key} is {shown(weights.get(key))}, expected {' or '.join(map(str, expected))}")
    if weights.get("actorder") not in (None, False, "weight", "static"):  # the others permute columns
        raise ConfigError(f"{where}: actorder is {shown(weights['actorder'])}, expected none: columns in their own order")
    group = weights.get("group_size") if weights["strategy"] == "group" else 0
    if type(group) is not int or group < 0:
        raise ConfigError(f"{where}: group_size is {shown(group)}, expected a number of columns")
    return int(weights["num_bits"]), group
