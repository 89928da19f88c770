"""Weights quantised in groups: the numbers they stand for, their parts, their products, and their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from npllama import checkpoint, forward, generate, parameter_shapes
from npllama.checkpoint import CheckpointError, load, open_model, verify
from npllama.cli import main
from npllama.engine import grouped, linear, threads
from npllama.engine.grouped import INT4, Grouped, Grouping, to_float32, to_int4
from npllama.engine.weights import form_of, is_packed, widen

import tiny
from quantised import CONFIG, random_grouped, write
from tiny import byte_swapped, relative_error, uniform

GROUPINGS = {
    "4 bits, zero": Grouping(4, 32, "float16", zero=8),
    "4 bits, offset": Grouping(4, 32, "float16", offset=True),
    "4 bits, bfloat16": Grouping(4, 64, "bfloat16", offset=True),
    "4 bits, two levels": Grouping(4, 16, "uint8", offset=True, unit=4),
    "4 bits, two levels, zero": Grouping(4, 16, "int8", zero=4, unit=2),
    "8 bits": Grouping(8, 32, "float16"),
    "8 bits, float32, both": Grouping(8, 16, "float32", offset=True, zero=-128),
    "8 bits, two levels": Grouping(8, 16, "int8", unit=4),
    "by row": Grouping(4, 32, "float16", offset=True, rows_first=True),
}
SHAPE = (13, 192)


@pytest.fixture(params=GROUPINGS)
def stored(request):
    return random_grouped(GROUPINGS[request.param], SHAPE)


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def n_threads(request, monkeypatch, threads_restored):
    threads.set_threads(request.param)
    monkeypatch.setattr(linear, "SHARED", 1)
    return request.param


# ------------------------------------------------------------------------------------------------------------------- a form


def test_the_numbers_are_those_of_the_definition(stored):
    weight, exact = stored
    assert weight.shape == weight.widen().shape == exact.shape
    assert (weight.ndim, weight.size) == (2, exact.size)
    assert form_of(weight) is weight
    assert is_packed(weight)
    # float16's and two levels' products are exact, so that only the sum is rounded.
    np.testing.assert_allclose(weight.widen(), exact, rtol=0, atol=np.spacing(np.abs(exact).max(), dtype=np.float32))
    if not weight.grouping.offset:
        np.testing.assert_array_equal(weight.widen(), exact)
    out = np.full(SHAPE, np.nan, np.float32)
    assert weight.widen(out) is out
    np.testing.assert_array_equal(out, weight.widen())


def test_its_bytes_are_what_the_grouping_says(stored):
    weight, _ = stored
    assert weight.nbytes == weight.grouping.stored_bytes(SHAPE) == sum(part.nbytes for part in weight.parts().values())


@pytest.mark.parametrize("part", [slice(0, 13), slice(3, 7), slice(12, 13), slice(4, 4), np.array([5, 0, 5, 12])], ids=str)
def test_rows_are_those_of_the_numbers_in_the_same_form(stored, part):
    weight, _ = stored
    rows = weight.rows(part)
    assert type(rows) is Grouped
    np.testing.assert_array_equal(rows.widen(), weight.widen()[part])


@pytest.mark.parametrize("part", [(0, 192), (64, 128), (128, 192), (64, 64), (16, 96), (0, 48), (8, 64), (2, 190)], ids=str)
def test_columns_are_those_of_the_numbers_wherever_they_are_cut(stored, part):
    """Cut columns at, and inside of, groups and units: they stay as large as the cut allows."""
    weight, _ = stored
    columns = weight.columns(slice(*part))
    numbers = weight.widen()[:, slice(*part)]
    assert type(columns) is Grouped
    np.testing.assert_array_equal(columns.widen(), numbers)
    x = uniform(2, (3, part[1] - part[0]))
    if x.size:
        assert relative_error(linear.linear(x, columns), x.astype(np.float64) @ numbers.astype(np.float64).T) < 1e-6
    if part == (64, 128):
        assert (columns.grouping, columns.nbytes) == (weight.grouping, weight.nbytes // 3)


def test_no_group_is_cut_between_two_columns_of_one_byte(stored):
    with pytest.raises(ValueError, match=r"columns 7 to 64 can't be cut from groups of \d+: expected even numbers"):
        stored[0].columns(slice(7, 64))


def test_tokens_take_rows(stored):
    weight, _ = stored
    tokens = np.array([[1, -1, 12], [0, 3, 3]])
    found = linear.embed(tokens, weight)
    np.testing.assert_array_equal(found, weight.widen()[np.maximum(tokens, 0)])
    assert found.flags.c_contiguous


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("name", GROUPINGS)
def test_every_path_is_the_product(name, rows, n_threads, monkeypatch):
    monkeypatch.setattr(linear, "tile_size", lambda n: 20 * 64 * n)  # tiles of a part of the rows and one or more groups
    monkeypatch.setattr(linear, "TILE", 20 * 384)
    monkeypatch.setattr(grouped, "IN_PLACE", rows * 500)
    weight, exact = random_grouped(GROUPINGS[name], (53, 384), seed=3)
    x = uniform(rows, (rows, 384))
    y = linear.linear(x, weight)
    assert (y.dtype, y.shape) == (np.float32, (rows, 53))
    assert relative_error(y, x.astype(np.float64) @ exact.T) < 1e-6


@pytest.mark.parametrize("name", GROUPINGS)
def test_foreign_byte_order_gives_the_same_bits(name):
    weight, _ = random_grouped(GROUPINGS[name], SHAPE)
    unit = None if weight.unit is None else byte_swapped(weight.unit)
    other = Grouped(weight.grouping, weight.values, byte_swapped(weight.scale), unit)
    np.testing.assert_array_equal(other.widen(), weight.widen())
    x = uniform(4, (2, SHAPE[1]))
    np.testing.assert_array_equal(linear.linear(x, other), linear.linear(x, weight))


def test_every_float16_scale_is_widened_exactly():
    every = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    for some in (every, every[np.isfinite(every)], every[:0], every[1 << 15 :][:31744], every[np.isinf(every)]):
        np.testing.assert_array_equal(to_float32(some).view(np.uint32), some.astype(np.float32).view(np.uint32))


WRONG = {
    "bits": ({"bits": 3}, r"bits is 3, expected 4 or 8"),
    "text": ({"bits": "4"}, r"bits is '4', expected int"),
    "odd": ({"group": 7}, r"group is 7, expected an even number"),
    "none": ({"group": 0}, r"group is 0, expected an even number"),
    "dtype": ({"scale": "float64"}, r"scale is 'float64', expected float32, float16, bfloat16 with unit 0"),
    "levels": ({"scale": "uint8"}, r"scale is 'uint8', expected float32, float16, bfloat16 with unit 0"),
    "unit": ({"unit": 2}, r"scale is 'float16', expected int8, uint8 with unit 2"),
    "zero": ({"zero": 256}, r"zero is 256 and unit 0, expected -255 to 255 and 0 or more"),
    "below": ({"zero": -256}, r"zero is -256"),
    "negative": ({"unit": -1}, r"unit -1, expected -255 to 255 and 0 or more"),
    "truth": ({"offset": 1}, r"offset is 1, expected bool"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_no_grouping_is_refused(fault):
    changes, expected = WRONG[fault]
    with pytest.raises(ValueError, match=expected):
        Grouping(**({"bits": 4, "group": 32, "scale": "float16"} | changes))


@pytest.mark.parametrize("zero", [-255, -128, -3, 0, 7, 8, 255])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_magnitude_is_that_of_all_numbers_of_a_group_of_two(bits, zero):
    grouping = Grouping(bits, 2, "float16", zero=zero)
    every = np.arange(16, dtype=np.uint8) if bits == 4 else np.arange(-128, 128).astype(np.int8)
    weight = Grouped.of(grouping, every.reshape(-1, 2), np.ones((1, len(every) // 2, 1), np.float16))
    assert np.abs(weight.widen()).max() == grouping.most


@pytest.mark.parametrize("n_rows", [1, 5])
def test_a_product_is_the_same_whatever_its_buffer_takes(stored, n_rows):
    weight, exact = stored
    (n_out, n_in), group = weight.shape, weight.grouping.group
    x = uniform(n_rows, (n_rows, n_in))
    for n_groups in (1, 2, 3, n_in // group):
        out = np.full((n_rows, n_out), np.nan, np.float32)
        weight.multiply(x.reshape(n_rows, -1, group).swapaxes(0, 1), np.empty(n_groups * group * n_out, np.float32), out)
        assert relative_error(out, x.astype(np.float64) @ exact.T) < 1e-6


def test_parts_of_another_form_are_refused():
    grouping = Grouping(4, 32, "float16")
    q, scale = np.zeros((3, 64), np.uint8), np.zeros((1, 3, 2), np.float16)
    with pytest.raises(ValueError, match=r"\[3, 60\] can't be quantised in groups, expected rows of a multiple of 32 numbers"):
        Grouped.of(grouping, q[:, :60], scale)
    for wrong in (scale.astype(np.float32), scale[:, :2], np.concatenate([scale, scale])):
        with pytest.raises(ValueError, match=r"scale is float\d\d \[.*\], expected float16 \[1, 2, 3\]"):
            Grouped.of(grouping, q, wrong)
    with pytest.raises(ValueError, match=r"values is int16"):
        Grouped.of(grouping, q.astype(np.int16), scale)


# -------------------------------------------------------------------------------------------------------------- our own int4


def test_int4_takes_the_nearest_of_sixteen():
    x = uniform(3, (40, 96)) * 2.0 ** (np.arange(40)[:, None] % 7 - 5)
    found = to_int4(x)
    groups = x.reshape(40, 3, 32).astype(np.float64)
    step = (groups.max(-1) - groups.min(-1)) / 15
    error = np.abs(found.widen().reshape(groups.shape) - groups)
    assert (error <= (0.5 + 0.01) * step[..., None]).all()  # a hundredth: scale and offset are float16
    assert (error >= 0.4 * step[..., None]).any()  # the bound is near, so that it can be missed
    scale, offset = found.all_levels()
    for q in range(16):  # no other of the 16 would be nearer
        others = (q * scale + offset).T[..., None]
        assert (np.abs(others - groups) >= error * (1 - 1e-6) - 1e-9).all()


def test_what_int4_makes_lies_as_it_is_read():
    form = to_int4(np.random.default_rng(0).standard_normal((8, 64)))
    assert all(part.flags.c_contiguous for part in form.parts().values())


def test_int4_of_what_is_int4_already_changes_nothing():
    weight, _ = random_grouped(INT4, (20, 64))
    weight.scale[0] = np.abs(weight.scale[0])
    values = weight.widen().reshape(20, 2, 32)
    values[..., 0], values[..., 1] = weight.all_levels()[1].T, (weight.all_levels()[1] + 15 * weight.all_levels()[0]).T
    again = to_int4(values.reshape(20, 64)).widen()
    assert relative_error(again, values.reshape(20, 64)) < 1e-3
    assert not to_int4(np.zeros((2, 32))).widen().any()


# ------------------------------------------------------------------------------------------------------- the model directory

WQ = "layers.0.attention.wq.weight"


@pytest.mark.parametrize("name", ["4 bits, offset", "4 bits, zero", "4 bits, two levels", "8 bits, two levels"])
def test_a_directory_holds_the_same_numbers_in_every_form(tmp_path, name):
    params = write(
        tmp_path / "m", GROUPINGS[name], config=tiny.config(n_layers=1, dim=128, ffn_dim=192, head_dim=32, n_heads=4)
    )
    model = open_model(tmp_path / "m")
    assert model.params.keys() == params.keys()
    assert (model.manifest["npllama_format"], model.manifest["dtype"]) == (2, "grouped")
    assert verify(tmp_path / "m") == []
    for key, weight in params.items():
        np.testing.assert_array_equal(widen(model.params[key]), widen(weight))
    tokens = np.arange(30)
    logits = forward(model.params, model.config, tokens)
    for dtype in ("stored", "float32"):
        opened = load(tmp_path / "m", dtype)
        assert isinstance(opened.params[WQ], Grouped) == (dtype == "stored")
        assert relative_error(forward(opened.params, opened.config, tokens), logits) < 5e-6
    wide = load(tmp_path / "m", "float64")
    exact = forward(wide.params, wide.config, tokens)
    assert relative_error(logits, exact) < 1e-5
    ids = [list(generate(opened, [1, 2, 3], max_tokens=8)) for opened in (load(tmp_path / "m", "stored"), wide)]
    assert ids[0] == ids[1]


def test_any_tool_reads_the_arrays_as_the_manifest_says(tmp_path):
    params = write(tmp_path / "m", GROUPINGS["4 bits, two levels"], tiny.config(n_layers=1, dim=64, n_heads=4, ffn_dim=192))
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert "weight[row, g * group + k] = scale[0, g, row] * (q - zero)" in manifest["reading"]["grouped"]
    for name in (WQ, "tok_embeddings.weight"):
        entry = manifest["tensors"][name]
        how = entry["grouping"]
        files = {"values": entry["file"]} | {part: entry[part]["file"] for part in ("scale", "unit") if part in entry}
        arrays = {part: np.load(tmp_path / "m" / file, mmap_mode="r") for part, file in files.items()}
        if how["rows_first"]:
            arrays = {part: np.moveaxis(array, 0, -1) for part, array in arrays.items()}
        weight = np.empty(entry["shape"], np.float32)
        for row in (0, 17, 63):
            for column in range(entry["shape"][1]):
                g, k = divmod(column, how["group"])
                half = how["group"] // 2
                if how["bits"] == 8:
                    q = int(arrays["values"][g, k, row])
                else:
                    byte = int(arrays["values"][g, k % half, row])
                    q = byte & 15 if k < half else byte >> 4
                level = [np.float32(x) for x in arrays["scale"][:, g, row]]
                if how["unit"]:
                    level = [x * np.float32(u) for x, u in zip(level, arrays["unit"][:, g // how["unit"], row], strict=True)]
                weight[row, column] = level[0] * np.float32(q - how["zero"]) + (level[1] if how["offset"] else np.float32(0))
            np.testing.assert_array_equal(weight[row], widen(params[name])[row])


def entry_of(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["tensors"][WQ])
    (folder / "manifest.json").write_text(json.dumps(manifest))


BAD = {
    "no grouping": (lambda t: t.pop("grouping"), r"wq\.weight': grouping: NoneType, expected an object$"),
    "bits": (lambda t: t["grouping"].update(bits=5), r"wq\.weight': grouping: bits is 5, expected 4 or 8$"),
    "key": (lambda t: t["grouping"].pop("zero"), r"wq\.weight': grouping: it has .*, expected bits, group, offset"),
    "no scale": (lambda t: t.pop("scale"), r"wq\.weight': scale: expected an object with file, bytes, sha256$"),
    "outside": (lambda t: t["scale"].update(file="../x.npy"), r"names a file outside the directory$"),
    "group": (
        lambda t: t["grouping"].update(group=64),
        r"\[96, 96\] can't be quantised in groups, expected rows of a multiple of 64",
    ),
    "dtype": (lambda t: t["grouping"].update(scale="float32"), r"scale\.npy holds float16 \[2, 3, 96\], expected float32"),
    "levels": (
        lambda t: t["grouping"].update(offset=False),
        r"scale\.npy holds float16 \[2, 3, 96\], expected float16 \[1, 3, 96\]",
    ),
    "order": (
        lambda t: t["grouping"].update(rows_first=True),
        r"wq\.weight\.npy holds uint8 \[3, 16, 96\], expected uint8 \[96, 3, 16\]",
    ),
    "size": (lambda t: t["scale"].update(bytes=7), r"scale\.npy is 1,280 bytes, expected 7$"),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_of_a_directory_has_its_line(tmp_path, fault):
    write(tmp_path / "m")
    change, expected = BAD[fault]
    entry_of(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=expected) as error:
        open_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_changed_or_missing_scale_is_found(tmp_path):
    write(tmp_path / "m")
    file = tmp_path / "m" / f"{WQ}.scale.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [problem.split(":")[0] for problem in verify(tmp_path / "m")] == [f"{file} is altered"]
    file.unlink()
    with pytest.raises(CheckpointError, match=r"wq\.weight\.scale\.npy is missing"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("value", "expected"), [(np.nan, "is not finite"), (np.inf, "is not finite"), (3e38, "is too large for float32")]
)
def test_scales_that_make_no_number_are_refused_by_name(tmp_path, value, expected):
    grouping = Grouping(4, 32, "float32", offset=True)
    weight = random_grouped(grouping, (96, 96))[0]
    weight.scale[1 if value != 3e38 else 0, 2, 70] = value
    with pytest.raises(CheckpointError, match=rf"^{WQ}: a scale of row 70 {expected}$"):
        write(tmp_path / "m", grouping, **{WQ: weight})
    assert not (tmp_path / "m").exists()


def test_rows_quantised_in_another_way_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^{WQ} is quantised as Grouping\(bits=8,.*, expected Grouping\(bits=4,"):
        write(tmp_path / "m", INT4, **{WQ: random_grouped(Grouping(8, 32, "float16"), (96, 96))[0]})
    kinds = dict.fromkeys(parameter_shapes(CONFIG), "float32")
    expected = rf"^{WQ} is quantised in groups, expected numbers to store as float32$"
    with pytest.raises(CheckpointError, match=expected), checkpoint.create(tmp_path / "m", CONFIG, kinds, {}) as writer:
        writer.add_blocks(WQ, [random_grouped(INT4, (96, 96))[0]])


def test_a_matrix_that_is_not_whole_groups_is_refused(tmp_path):
    kinds = dict.fromkeys(parameter_shapes(CONFIG), "float32") | {WQ: Grouping(4, 128, "float16")}
    expected = rf"^{WQ}: \[96, 96\] can't be quantised in groups"
    with pytest.raises(CheckpointError, match=expected), checkpoint.create(tmp_path / "m", CONFIG, kinds, {}):
        pass


def test_info_says_the_bits_of_a_weight(tmp_path, capsys):
    write(tmp_path / "m")
    assert main(["info", str(tmp_path / "m")]) == 0
    lines = capsys.readouterr().out.splitlines()
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.npy"))
    n = sum(np.prod(shape) for shape in parameter_shapes(CONFIG).values())
    assert lines[1].endswith(f"{n_bytes:,} bytes, {n_bytes * 8 / n:.2f} bits per weight")
    assert lines[2] == "stored as 4 bits in groups of 32 (8 tensors), 8 bits in groups of 32 (1 tensors), float32 (3 tensors)"
