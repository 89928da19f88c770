"""Read Hugging Face folders with quantised matrices: MLX's, compressed-tensors' (pack-quantized), GPTQ's and AWQ's.

Each becomes a Quantised under the name of the plain weight, with the same integers and scales.
Source: mlx.core.quantize; compressed_tensors, compressors/pack_quantized; auto_gptq, nn_modules/qlinear/qlinear_cuda.py;
gptqmodel, utils/model.py (zero points); awq, utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from npllama.checkpoint import CheckpointError
from npllama.config import ConfigError
from npllama.engine.grouped import Grouped, Grouping
from npllama.engine.weights import native, widen
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
    """Hold a quantised matrix [out, in], whose rows can be read in part."""

    shape: tuple[int, ...]
    grouping: Grouping
    rows: Callable[[Rows], Grouped]


@dataclass(frozen=True)
class Undone:
    """Hold a matrix [out, in] in a quantisation that npllama does not store; its rows are read as float64."""

    shape: tuple[int, ...]
    what: str
    rows: Callable[[Rows], np.ndarray]


Found = Mapping[str, np.ndarray | None]
Unpacked = dict[str, np.ndarray | Quantised | Undone | None]
Settings = Mapping[str, object]
Reader = Callable[[object, Settings, Found], Unpacked]
Numbers = Callable[[Rows], np.ndarray]  # of some rows: uint8 [n, in], or the zero points [n, groups]
IN_ORDER = {4: (0, 1, 2, 3, 4, 5, 6, 7), 8: (0, 1, 2, 3)}  # bits -> each number's position in a word, from the lowest bits
INTERLEAVED = {4: (0, 4, 1, 5, 2, 6, 3, 7)}  # AWQ's


def open_quantised(where: object, values: Mapping[str, object], found: Found) -> Unpacked:
    """Return the tensors, each quantised matrix's parts joined. Raises CheckpointError or ConfigError for an unknown form."""
    read, settings = reader_of(values)
    return dict(found) if read is None else read(where, settings, found)


def reader_of(values: Mapping[str, object]) -> tuple[Reader | None, Settings]:
    """Return the reader for the quantisation in config.json, and its settings; None if there is none.

    Raises ConfigError for an unsupported quantisation.
    """
    if isinstance(settings := values.get("quantization"), Mapping):
        return _mlx, settings
    if not isinstance(settings := values.get("quantization_config"), Mapping):
        return None, {}
    method = str(settings.get("quant_method", "an unnamed method"))
    if method not in METHODS:
        known = "float32, float16, bfloat16, MLX, compressed-tensors, GPTQ or AWQ"
        raise ConfigError(f"the weights are quantized by {method:.80}, expected {known}")
    read, check = METHODS[method]
    check(settings)
    return read, settings


def _mlx(where: object, settings: Settings, found: Found) -> Unpacked:
    """Read NAME.weight uint32 [out, in · bits / 32], NAME.scales and NAME.biases [out, groups]: w = scale · q + bias."""
    out: Unpacked = dict(found)
    for name in [name.removesuffix(".scales") for name in found if name.endswith(".scales")]:
        own = settings.get(name, settings)
        if not isinstance(own, Mapping) or own.get("mode", "affine") != "affine":
            raise ConfigError(f"quantization of {name} is {shown(own)}, expected the mode affine")
        bits, group = own.get("bits"), own.get("group_size")
        if type(bits) is not int or bits not in (2, 3, 4, 5, 6, 8) or type(group) is not int or group < 2:
            raise ConfigError(f"quantization of {name} is {shown(own)}, expected 2 to 6 or 8 bits, and a group_size")
        packed, scales, biases = (_taken(where, out, f"{name}.{part}") for part in ("weight", "scales", "biases"))
        _check_words(f"{where}: {name}", packed)
        shape = packed.shape[0], packed.shape[1] * 32 // bits
        if packed.shape[1] * 32 % bits:
            raise CheckpointError(f"{where}: {name}.weight is {list(packed.shape)}, which holds no rows of {bits}-bit numbers")
        out[f"{name}.weight"] = _affine(f"{where}: {name}", shape, _in_rows(packed, bits), bits, group, [scales, biases])
    return out


def _taken(where: object, found: Unpacked, name: str, ndim: int = 2) -> np.ndarray:
    array = found.pop(name, None)
    if not isinstance(array, np.ndarray) or array.ndim != ndim:
        expected = "a matrix" if ndim == 2 else "a vector"
        raise CheckpointError(f"{where}: {name} is {'missing' if array is None else list(array.shape)}, expected {expected}")
    return array


def _check_words(where: str, *packed: np.ndarray) -> None:
    for words in packed:
        if words.dtype.kind not in "iu" or words.dtype.itemsize != 4:
            raise CheckpointError(f"{where}: {words.dtype}, expected whole numbers of 32 bits")


def _check_shape(where: str, what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"{where}: {what} is {list(found)}, expected {list(expected)}")


def _affine(
    where: str,
    shape: tuple[int, int],
    numbers: Numbers,
    bits: int,
    group: int,
    parts: list[np.ndarray],
    zero: int | Numbers = 0,
) -> Quantised:
    """Make a matrix from integers q, scales [out, groups], biases, if any, and zero points, which are subtracted from q.

    group   its columns; 0: whole rows
    zero    one number for all; or one for each group: unless all are equal, they become offsets -scale · zero, exact in
            float32
    """
    scales, group = parts[0], group or max(1, shape[1])
    for part in parts:
        if part.shape != (shape[0], shape[1] // group) or shape[1] % group or part.dtype != scales.dtype:
            raise CheckpointError(
                f"{where}: {part.dtype} {list(part.shape)} next to scales of {scales.dtype}, expected "
                f"{[shape[0], shape[1] // group]} for {list(shape)} in groups of {group}"
            )
    scale_dtype = SCALES.get(scales.dtype.char)
    if scale_dtype is None:
        raise CheckpointError(f"{where}: scales of {scales.dtype}, expected floats")
    shift = 128 if bits == 8 else 0  # 0 to 255 are stored as -128 to 127
    if not isinstance(zero, int):
        of_all = zero(slice(None))
        if of_all.size and of_all.min() == of_all.max():
            zero = int(of_all.flat[0])
    try:
        if isinstance(zero, int):
            grouping = Grouping(4 if bits <= 4 else 8, group, scale_dtype, len(parts) > 1, zero - shift)
        else:
            grouping = Grouping(bits, group, "float32", True)
        grouping.check(shape)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None

    def rows(part: Rows) -> Grouped:
        q = numbers(part)
        if bits > 4:
            q = (q.astype(np.int16) - shift).astype(np.int8)
        levels = [native(x[part]) for x in parts]
        if not isinstance(zero, int):
            scale = widen(levels[0]).astype(np.float32)
            levels = [scale, -scale * (zero(part).astype(np.float32) - np.float32(shift))]
        return Grouped.of(grouping, q, np.stack(levels))

    return Quantised(shape, grouping, rows)


def _in_rows(packed: np.ndarray, bits: int) -> Numbers:
    """Unpack numbers that are consecutive in the words of their row.    packed [out, words]"""
    return lambda part: unpacked(packed[part], bits)


def _in_columns(packed: np.ndarray, n_rows: int, bits: int, order: tuple[int, ...], add: int = 0) -> Numbers:
    """Unpack numbers from words that each hold one column of neighbouring rows.    packed [in, words] -> [n, in]

    n_rows  how many there are; the last word may hold more
    order   the position in a word of each of its rows, from the lowest bits
    add     is added to every word first, modulo 2^32
    """
    per_word = 32 // bits
    places = np.array(order, np.uint32) * np.uint32(bits)

    def numbers(part: Rows) -> np.ndarray:
        rows = np.arange(n_rows)[part]
        words = native(packed[:, rows // per_word]).view(np.uint32) + np.uint32(add)
        return np.ascontiguousarray((words >> places[rows % per_word] & np.uint32((1 << bits) - 1)).astype(np.uint8).T)

    return numbers


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack numbers from words, lowest bits first.    [n, words] of 32 bits -> uint8 [n, words · 32 / bits]"""
    octets = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).view(np.uint8)
    by_bit = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), words.shape[1] * 32 // bits, bits)
    return np.packbits(by_bit, axis=-1, bitorder="little")[..., 0]


# ----------------------------------------------------------------------------------------------------------- compressed-tensors


def _compressed(where: object, settings: Settings, found: Found) -> Unpacked:
    """Read NAME.weight_packed int32 [out, in · bits / 32] and NAME.weight_scale [out, groups]: w = scale · (q − zero).

    zero is 2^(bits − 1); or NAME.weight_zero_point int32 [out · bits / 32, groups] has that of each group, in columns.
    """
    bits, group, symmetric = _compressed_settings(settings)
    out: Unpacked = dict(found)
    for name in [name.removesuffix("_packed") for name in found if name.endswith(".weight_packed")]:
        packed, scales = (_taken(where, out, f"{name}_{part}") for part in ("packed", "scale"))
        stated = out.pop(f"{name}_shape", None)
        _check_words(f"{where}: {name}", packed)
        shape = packed.shape[0], packed.shape[1] * 32 // bits
        zero: int | Numbers = 1 << bits - 1
        if not symmetric:
            zeros = _taken(where, out, f"{name}_zero_point")
            _check_words(f"{where}: {name}_zero_point", zeros)
            _check_shape(f"{where}: {name}", "the zero_point", zeros.shape, (-(-shape[0] * bits // 32), scales.shape[1]))
            zero = _in_columns(zeros.T, shape[0], bits, IN_ORDER[bits])
        tensor = _affine(f"{where}: {name}", shape, _in_rows(packed, bits), bits, group, [scales], zero)
        if not isinstance(stated, np.ndarray) or stated.tolist() != list(tensor.shape):
            found_shape = stated.tolist() if isinstance(stated, np.ndarray) else "missing"
            raise CheckpointError(f"{where}: {name}_shape is {found_shape}, expected {list(tensor.shape)}")
        out[name] = tensor
    return out


def _compressed_settings(config: Settings) -> tuple[int, int, bool]:
    """Return the bits, the group size (0: whole rows), and whether it is symmetric. Raises ConfigError for an unknown form."""
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
    _expect(weights, {"type": ("int",), "symmetric": (True, False), "strategy": ("group", "channel"), "num_bits": (4, 8)})
    if weights.get("actorder") not in (None, False, "weight", "static"):  # the others permute columns
        raise ConfigError(f"{where}: actorder is {shown(weights['actorder'])}, expected none: columns in their own order")
    group = weights.get("group_size") if weights["strategy"] == "group" else 0
    if type(group) is not int or group < 0:
        raise ConfigError(f"{where}: group_size is {shown(group)}, expected a number of columns")
    return int(weights["num_bits"]), group, bool(weights["symmetric"])


def _expect(config: Settings, wanted: Mapping[str, tuple[object, ...]]) -> None:
    """Raise ConfigError unless each setting has one of its known values."""
    for key, expected in wanted.items():
        if config.get(key) not in expected:
            found, known = shown(config.get(key)), " or ".join(str(value) for value in expected if value is not None)
            raise ConfigError(f"quantization_config: {key} is {found}, expected {known}")


# ----------------------------------------------------------------------------------------------------------------- GPTQ and AWQ


def _group_size(config: Settings) -> int:
    """Return a group's number of columns; 0 for whole rows, which files write as -1."""
    group = config.get("group_size")
    if type(group) is not int or (group < 1 and group != -1):
        raise ConfigError(f"quantization_config: group_size is {shown(group)}, expected a number of columns, or -1")
    return max(0, group)


def _gptq(where: object, settings: Settings, found: Found) -> Unpacked:
    """Read NAME.qweight int32 [in · bits / 32, out], NAME.qzeros int32 [groups, out · bits / 32], NAME.scales [groups, out].

    w = scale · (q − zero). NAME.g_idx [in] has each column's group, where they aren't in order.
    """
    bits, group, stored_less_one = _gptq_settings(settings)
    out: Unpacked = dict(found)
    for name in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        here = f"{where}: {name}"
        packed, zeros, scales = (_taken(where, out, f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        _check_words(here, packed, zeros)
        shape = packed.shape[1], packed.shape[0] * 32 // bits
        size = max(1, min(group or shape[1], shape[1]))  # a group may be wider than the matrix
        n_groups = -(-shape[1] // size)
        _check_shape(here, "scales", scales.shape, (n_groups, shape[0]))
        _check_shape(here, "qzeros", zeros.shape, (n_groups, -(-shape[0] * bits // 32)))
        if stored_less_one and not _by_gptqmodel(settings):
            _refuse_lost_zeros(here, _in_columns(zeros, shape[0], bits, IN_ORDER[bits])(slice(None)), bits)
        ones = sum(1 << at for at in range(0, 32, bits)) if stored_less_one else 0
        of_groups = _in_columns(zeros, shape[0], bits, IN_ORDER[bits], add=ones)
        numbers, scales, groups = _in_rows(packed.T, bits), scales.T, np.arange(shape[1]) // size
        if f"{name}.g_idx" in out or settings.get("desc_act"):
            groups = native(_taken(where, out, f"{name}.g_idx", ndim=1))
            _check_shape(here, "g_idx", groups.shape, shape[1:])
            if groups.dtype.kind not in "iu" or groups.min(initial=0) < 0 or groups.max(initial=0) >= n_groups:
                raise CheckpointError(
                    f"{here}: g_idx has a group that is none, {groups.dtype}, expected whole numbers from 0 to {n_groups - 1}"
                )
        by_group = groups[: shape[1] // size * size].reshape(-1, size)
        if shape[1] % size == 0 and (by_group == by_group[:, :1]).all():
            of = by_group[:, 0]  # groups may be permuted; the order of columns within one doesn't matter
            if not np.array_equal(of, np.arange(n_groups)):
                scales, of_groups = scales[:, of], _chosen(of_groups, of)
            out[f"{name}.weight"] = _affine(here, shape, numbers, bits, size, [scales], of_groups)
        else:
            out[f"{name}.weight"] = _act_order(here, shape, numbers, scales, of_groups, groups)
    return out


def _chosen(zeros: Numbers, groups: np.ndarray) -> Numbers:
    return lambda part: zeros(part)[:, groups]


def _act_order(
    where: str, shape: tuple[int, int], numbers: Numbers, scales: np.ndarray, zeros: Numbers, groups: np.ndarray
) -> Undone:
    """Make a matrix whose groups are not adjacent columns: making them adjacent would mean permuting its input.

    That is another tensor's output: the residual stream, which all layers share, or attention heads.
    """
    if scales.dtype.char not in SCALES:
        raise CheckpointError(f"{where}: scales of {scales.dtype}, expected floats")

    def rows(part: Rows) -> np.ndarray:
        scale = widen(native(scales[part])).astype(np.float64)
        return scale[:, groups] * (numbers(part).astype(np.float64) - zeros(part)[:, groups])

    return Undone(shape, "GPTQ with act-order (g_idx scatters the columns of a group)", rows)


def _by_gptqmodel(settings: Settings) -> bool:
    meta = settings.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return any(str(maker).startswith("gptqmodel:") for maker in (makers if isinstance(makers, list) else [makers]))


def _refuse_lost_zeros(where: str, zeros: np.ndarray, bits: int) -> None:
    """Refuse a zero point of 0 that was stored less one. gptqmodel subtracts from whole words, so that adding restores all.

    Others write it over its neighbours, and libraries disagree about what such a file means.
    """
    largest = (1 << bits) - 1
    if (zeros == largest).any():
        raise CheckpointError(f"{where}: qzeros has a {largest}, a zero point of 0 less one, which libraries read differently")


def _gptq_settings(config: Settings) -> tuple[int, int, bool]:
    """Return the bits, the size of a group (0: whole rows), and whether zero points are stored less one.

    Raises ConfigError for an unknown form.
    """
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    form = "marlin" if config.get("is_marlin_format") else str(form).lower()
    _expect({**config, "checkpoint_format": form}, {"checkpoint_format": ("gptq", "gptq_v2"), "bits": (4, 8)})
    _expect(config, {"pack_dtype": ("int32", None)})
    return 4 if config["bits"] == 4 else 8, _group_size(config), form == "gptq"


def _awq(where: object, settings: Settings, found: Found) -> Unpacked:
    """Read NAME.qweight int32 [in, out / 8], NAME.qzeros int32 [groups, out / 8] and NAME.scales [groups, out].

    w = scale · (q − zero).

    The eight numbers of a word belong to rows 0, 2, 4, 6, 1, 3, 5, 7 of eight, from the lowest bits.
    """
    bits, group = _awq_settings(settings)
    out: Unpacked = dict(found)
    for name in [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]:
        here = f"{where}: {name}"
        packed, zeros, scales = (_taken(where, out, f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        _check_words(here, packed, zeros)
        shape = packed.shape[1] * 32 // bits, packed.shape[0]
        _check_shape(here, "qzeros", zeros.shape, (len(scales), packed.shape[1]))
        numbers, of_groups = (_in_columns(words, shape[0], bits, INTERLEAVED[bits]) for words in (packed, zeros))
        out[f"{name}.weight"] = _affine(here, shape, numbers, bits, group, [scales.T], of_groups)
    return out


def _awq_settings(config: Settings) -> tuple[int, int]:
    """Return the bits, and the size of a group (0: whole rows). Raises ConfigError for an unknown form."""
    form = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    form = "llm-awq" if config.get("backend") == "llm-awq" else form
    _expect({**config, "version": form}, {"version": ("gemm",), "bits": (4,), "zero_point": (True, None)})
    return 4, _group_size(config)


METHODS: dict[str, tuple[Reader, Callable[[Settings], object]]] = {  # its reader, and a check that refuses its other forms
    "compressed-tensors": (_compressed, _compressed_settings),
    "gptq": (_gptq, _gptq_settings),
    "awq": (_awq, _awq_settings),
}
