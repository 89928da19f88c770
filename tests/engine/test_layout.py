"""Check the layout of weights: every value under its name, matrices of one x adjacent, and the memory predicted exactly."""

from __future__ import annotations

import mmap
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from npllama import checkpoint, forward, parameter_shapes
from npllama.checkpoint import load, reading
from npllama.engine import layout, linear
from npllama.engine.weights import block_of

import tiny
from tiny import CONFIGS, random_params, relative_error

CONFIG = next(iter(CONFIGS.values()))
MAPPED = pytest.mark.skipif(sys.byteorder == "big", reason="this machine is big-endian: files are not mapped")


def all_names(config):
    return [name for group in layout.groups(config) for name in group]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_is_in_one_group(config):
    assert sorted(all_names(config)) == sorted(parameter_shapes(config))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_value_is_where_its_name_says(config, storage, dtype, monkeypatch):
    monkeypatch.setattr(layout, "TILE", 100)  # many parts, the last ones shorter
    pack = {"float32": lambda x: x, "bfloat16": linear.to_bfloat16, "float16": lambda x: x.astype("f2"), "int8": linear.to_int8}
    params = {name: pack[storage](x) if x.ndim == 2 else x for name, x in random_params(config, seed=3).items()}
    dense = layout.in_memory(params, config, dtype)
    assert list(dense) == list(params)
    for name, x in dense.items():
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, linear.widen(params[name]).astype(dtype))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_foreign_byte_order_is_made_native(storage):
    pack = {"float32": lambda x: x, "bfloat16": linear.to_bfloat16, "float16": lambda x: x.astype("f2")}[storage]
    params = {name: pack(x) if x.ndim == 2 else x for name, x in random_params(CONFIG, seed=3).items()}
    others = {name: tiny.byte_swapped(x) for name, x in params.items()}
    assert layout.new_bytes(others, CONFIG, np.float32) == sum(4 * x.size for x in params.values())
    dense = layout.in_memory(others, CONFIG, np.float32)
    for name, x in dense.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, linear.widen(params[name]))


@pytest.mark.parametrize("packed", ["w1", "w3"])
def test_a_group_stored_in_two_ways_is_widened_where_it_is_packed(packed, monkeypatch):
    monkeypatch.setattr(layout, "SHORT_ROW", 8)  # nothing is transposed
    params = random_params(CONFIG, seed=3)
    name = f"layers.0.feed_forward.{packed}.weight"
    params[name] = linear.to_bfloat16(params[name])
    dense = layout.in_memory(params, CONFIG, np.float32)
    for name, x in dense.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, linear.widen(params[name]))
    new = [x.nbytes for name, x in dense.items() if x is not params[name]]
    assert layout.new_bytes(params, CONFIG, np.float32) == sum(new)


def test_matrices_of_one_x_are_multiplied_as_one(monkeypatch):
    params = layout.in_memory(random_params(CONFIG, seed=1), CONFIG, np.float32)
    q, k, v = (params[f"layers.0.attention.{leaf}.weight"] for leaf in ("wq", "wk", "wv"))
    x = tiny.uniform(1, (3, CONFIG.dim))
    calls = []
    plain = linear.linear
    monkeypatch.setattr(linear, "linear", lambda x, weight: calls.append(weight.shape) or plain(x, weight))
    for weights, n_calls in (((q, k, v), 1), ((q, v, k), 3), ((q, k), 2), ((k, v), 2), ((q, q, q), 3), ((q,), 1)):
        calls.clear()
        found = linear.linears(x, *weights)
        assert len(calls) == n_calls
        for y, weight in zip(found, weights, strict=True):
            assert relative_error(y, x.astype(np.float64) @ weight.astype(np.float64).T) < 1e-6


def test_each_group_of_short_rows_is_one_block():
    params = layout.in_memory(random_params(CONFIG, seed=1), CONFIG, np.float32)
    for names in layout.groups(CONFIG):
        if len(names) > 1:
            assert block_of([params[name] for name in names]) is not None
        else:
            assert type(params[names[0]]) is np.ndarray


@pytest.mark.parametrize("short_row", [24, 25])
@pytest.mark.parametrize("ffn_dim", [11, 12])
def test_rows_that_are_short_and_no_longer_than_the_columns_are_transposed(short_row, ffn_dim, monkeypatch):
    """Count the rows of a group together: columns of wq, wk and wv have 12 numbers, those of w1 and w3 22 or 24."""
    config = tiny.config(dim=24, n_heads=1, n_kv_heads=1, head_dim=4, ffn_dim=ffn_dim, vocab_size=50, tied_embeddings=False)
    monkeypatch.setattr(layout, "SHORT_ROW", short_row)
    dense = layout.in_memory(random_params(config, seed=1), config, np.float32)
    found = {name.split(".")[-2] for name, x in dense.items() if x.ndim == 2 and x.strides[0] < x.strides[1]}
    of_24 = ({"output"} | ({"w1", "w3"} if ffn_dim == 12 else set())) if short_row > 24 else set()
    assert found == {"wo", "w2"} | of_24


@pytest.mark.parametrize("short_row", [8, 1 << 20])
def test_weights_are_filled_in_as_many_rows_at_once_as_a_tile_holds(short_row, monkeypatch):
    rows_at_once, form_of = [], layout.form_of

    class Watched:
        def __init__(self, weight):
            self.form = form_of(weight)

        def rows(self, part):
            rows = self.form.rows(part)
            rows_at_once.append(rows.shape)
            return rows

    monkeypatch.setattr(layout, "SHORT_ROW", short_row)
    monkeypatch.setattr(layout, "TILE", 1000)
    monkeypatch.setattr(layout, "form_of", Watched)
    params = {name: linear.to_bfloat16(x) for name, x in random_params(CONFIG, seed=1).items()}
    layout.in_memory(params, CONFIG, np.float32)
    expected = []
    for x in params.values():
        step = 1000 // (x.size // len(x))
        expected += [x[i : i + step].shape for i in range(0, len(x), step)]
    assert sorted(rows_at_once) == sorted(expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_pass_is_the_same(config):
    params = random_params(config, seed=4)
    tokens = tiny.random_tokens(config, seed=5, shape=9)
    laid_out = layout.in_memory(params, config, np.float32)
    assert relative_error(forward(laid_out, config, tokens), forward(params, config, tokens)) < 3e-6


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_it_takes_is_told(config, dtype):
    params = random_params(config, seed=6)
    predicted = layout.new_bytes(params, config, dtype)
    layout.in_memory(params, config, dtype)
    tracemalloc.start()
    dense = layout.in_memory(params, config, dtype)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert predicted <= taken < predicted + 60_000 + 600 * len(dense)


@MAPPED
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_long_rows_stay_mapped(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(layout, "SHORT_ROW", 8)
    params = random_params(CONFIG, seed=7)
    with checkpoint.create(tmp_path / "m", CONFIG, storage, source={"kind": "test"}) as writer:
        for name, x in params.items():
            writer.add(name, x)
    model = load(tmp_path / "m", "float32")
    mapped = [name for name, x in model.params.items() if isinstance(x.base, np.memmap)]
    assert mapped == (list(params) if storage == "float32" else [])


@pytest.mark.parametrize(("free", "dtype"), [(1 << 40, "float32"), (0, "stored")])
def test_auto_logs_what_it_did_and_why(tmp_path, free, dtype, monkeypatch, caplog):
    with checkpoint.create(tmp_path / "m", CONFIG, "bfloat16", source={"kind": "test"}) as writer:
        for name, x in random_params(CONFIG, seed=8).items():
            writer.add(name, x)
    monkeypatch.setattr(reading, "available_memory", lambda: free)
    monkeypatch.setattr(reading, "free_memory", lambda: free)
    with caplog.at_level("INFO", logger="npllama"):
        model = load(tmp_path / "m")
    matrix = model.params["layers.0.attention.wo.weight"]
    assert matrix.dtype == (np.float32 if dtype == "float32" else np.uint16)
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    if dtype == "float32":
        assert [(level, "widened to float32" in message) for level, message in found] == [("INFO", True)]
    else:
        mapped = sys.byteorder == "little"  # files are; elsewhere they are read into memory
        assert [level for level, _ in found] == ["WARNING"] * (1 + mapped)
        assert "stay as stored" in found[0][1]
        assert not mapped or "from the disk again" in found[1][1]


def test_an_embedding_that_is_not_the_output_is_left_where_it_is():
    untied = next(config for config in CONFIGS.values() if not config.tied_embeddings)
    params = random_params(untied, seed=9)
    assert layout.in_memory(params, untied, np.float32)["tok_embeddings.weight"] is params["tok_embeddings.weight"]


class Mapping:
    """A stand-in for a file's mapping that records the advice given for it."""

    def __init__(self, name: str, n_bytes: int, given: list[tuple[str, int]]):
        self.name, self.n_bytes, self.given = name, n_bytes, given

    def __len__(self) -> int:
        return self.n_bytes

    def madvise(self, advice: int) -> None:
        self.given.append((self.name, advice))


@MAPPED
@pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="this system's mmap takes no advice")
@pytest.mark.parametrize("fits", [True, False])
def test_the_system_is_told_how_mapped_weights_will_be_read(tmp_path, fits, monkeypatch, caplog):
    params = random_params(CONFIG, seed=9)
    with checkpoint.create(tmp_path / "m", CONFIG, "bfloat16", source={"kind": "test"}) as writer:
        for name, x in params.items():
            writer.add(name, x)
    model, given = checkpoint.open_model(tmp_path / "m"), []
    for name, x in model.params.items():
        x.base._mmap = Mapping(name, x.nbytes, given)
    n_bytes = sum(x.nbytes for x in model.params.values())
    monkeypatch.setattr(reading, "free_memory", lambda: n_bytes - (not fits))
    reading.read_ahead(model.params)
    for thread in threading.enumerate():
        if thread.name == "npllama-read-ahead":
            thread.join()
    advice = mmap.MADV_WILLNEED if fits else mmap.MADV_SEQUENTIAL
    assert given == [(name, advice) for name in params]
    assert ("from the disk again" in caplog.text) == (not fits)
