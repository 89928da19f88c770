"""Recording, replacing and writing activations."""

from __future__ import annotations

import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from npllama import forward
from npllama.activations import activation_shapes
from npllama.checkpoint import load
from npllama.engine.grouped import INT4, Grouped, Grouping
from npllama.engine.weights import widen
from npllama.golden.precision import Precision
from npllama.golden.trace import (
    Recording,
    Selection,
    TraceError,
    new_trace,
    parse_layers,
    patched,
    read_trace,
    record,
    trace_size,
    write_trace,
)

import quantised
import tiny
from system import full_disk

CONFIG = tiny.CONFIGS["grouped"]
MODEL = SimpleNamespace(config=CONFIG, params=tiny.random_params(CONFIG, seed=1), path=None)
TOKENS = tiny.random_tokens(CONFIG, seed=2, shape=7)


def activations_of(tokens):
    activations = {}
    forward(MODEL.params, CONFIG, tokens, tap=lambda name, x: activations.setdefault(name, x.copy()))
    return activations


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_traced_as_the_numbers_that_they_stand_for(tmp_path, bits, precision):
    """Check to the bit: a port with the same weights then differs only by its arithmetic."""
    quantised.write(tmp_path / "m", INT4 if bits == 4 else Grouping(8, 32, "float16"))
    model = load(tmp_path / "m", "stored")
    wide = SimpleNamespace(config=model.config, path=None, params={name: widen(x) for name, x in model.params.items()})
    traces = [
        write_trace(m, TOKENS, tmp_path / name, steps=2, precision=Precision(precision))
        for name, m in (("quantised", model), ("wide", wide))
    ]
    assert isinstance(model.params["layers.0.attention.wq.weight"], Grouped)
    assert traces[0].keys() == traces[1].keys()
    for name, x in traces[1].items():
        np.testing.assert_array_equal(traces[0][name], x, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("shape", [(7,), (2, 5)], ids=str)
def test_every_activation_has_its_name_and_shape(shape):
    found = record(MODEL, tiny.random_tokens(CONFIG, 2, shape))
    expected = activation_shapes(CONFIG, shape[-1], batch_shape=shape[:-1])
    assert {name: x.shape for name, x in found.items()} == expected
    assert list(found) == list(expected)


def test_a_recording_is_safe_from_work_in_place():
    """Check that a change of an activation after the tap doesn't reach the recording."""

    def spoil(name, x):
        recording(name, x)
        if name == "layers.0.attention.q":
            x *= 2
        return x

    recording = Recording()
    forward(MODEL.params, CONFIG, TOKENS, tap=spoil)
    np.testing.assert_array_equal(recording["layers.0.attention.q"], activations_of(TOKENS)["layers.0.attention.q"])


def test_decode_steps_are_the_cached_pass():
    tokens = tiny.random_tokens(CONFIG, 3, 6)
    whole = record(MODEL, tokens)
    stepwise = record(MODEL, tokens[:4], steps=tokens[4:])
    for i in (0, 1):
        for name, x in whole.items():
            step = stepwise[f"step.{i}/{name}"]
            if name.endswith(("scores", "weights")):
                assert step.shape == (CONFIG.n_heads, 1, 5 + i)
                x, step = x[:, 4 + i, : 5 + i], step[:, 0]
            else:
                x, step = x[4 + i], step[0]
            assert tiny.relative_error(step, x) < 1e-5, name
    assert list(stepwise) == list(whole) + [f"step.{i}/{name}" for i in (0, 1) for name in whole]


def test_steps_without_ids_are_greedy(tmp_path):
    trace = write_trace(MODEL, [5, 9, 2], tmp_path / "t", steps=3)
    tokens = [5, 9, 2]
    for _ in range(3):
        tokens.append(int(np.argmax(forward(MODEL.params, CONFIG, tokens)[-1])))
    assert trace.meta["steps"] == [[token] for token in tokens[3:]]
    again = write_trace(MODEL, [5, 9, 2], tmp_path / "again", steps=trace.meta["steps"])  # as one writes it, so one can feed it
    assert again.meta == trace.meta


def test_steps_of_a_batch_take_one_id_for_each_row(tmp_path):
    trace = write_trace(MODEL, [[5, 9], [-1, 2]], tmp_path / "t", steps=[[1, 2], [3, 4]])
    assert trace.meta["steps"] == [[1, 2], [3, 4]]
    assert trace["step.1/logits"].shape == (2, 1, CONFIG.vocab_size)
    alone = record(MODEL, [2], steps=[2, 4])
    assert tiny.relative_error(trace["step.1/logits"][1], alone["step.1/logits"]) < 6e-6


# ---------------------------------------------------------------------------------------------------------------- replacing


def test_a_replaced_activation_goes_on_and_nothing_before_it_changes():
    name = "layers.1.attention.weights"
    plain = record(MODEL, TOKENS)
    new = np.full_like(plain[name], 1 / len(TOKENS))
    changed = record(MODEL, TOKENS, patch={name: new})
    names = list(plain)
    for before in names[: names.index(name)]:
        np.testing.assert_array_equal(changed[before], plain[before])
    np.testing.assert_array_equal(changed[name], new)
    heads = np.repeat(plain["layers.1.attention.v"].mean(axis=0), CONFIG.n_heads // CONFIG.n_kv_heads, axis=0)  # [H, K]
    np.testing.assert_allclose(
        changed["layers.1.attention.heads"], np.broadcast_to(heads, (7, *heads.shape)), rtol=1e-5, atol=1e-6
    )
    assert (changed["logits"] != plain["logits"]).any()


def test_a_function_may_replace_and_may_work_in_place_without_spoiling_others():
    def double(x):
        x *= 2
        return x

    plain = record(MODEL, TOKENS)
    changed = record(MODEL, TOKENS, patch={"layers.0.attention_norm": double})
    np.testing.assert_array_equal(changed["layers.0.attention_norm"], 2 * plain["layers.0.attention_norm"])
    np.testing.assert_array_equal(changed["layers.0.attention.q"], 2 * plain["layers.0.attention.q"])


def test_a_replacement_takes_on_the_dtype():
    seen = []
    tap = patched({"tok_embeddings": np.ones((7, CONFIG.dim))}, lambda name, x: seen.append(x.dtype) or x)
    forward(MODEL.params, CONFIG, TOKENS, tap=tap)
    assert set(seen) == {np.dtype("float32")}


def test_only_one_step_can_be_patched():
    found = record(MODEL, TOKENS, steps=2, patch={"step.1/logits": np.zeros_like})
    assert not found["step.1/logits"].any()
    assert found["step.0/logits"].any()


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (
            {"layers.0.attention.q": np.zeros(3)},
            r"patch of layers.0.attention.q is float64 of shape \(3,\), expected numbers of",
        ),
        ({"layers.0.out": lambda x: None}, r"patch of layers.0.out is object"),
        ({"layers.7.out": np.zeros(3)}, r"patch of layers.7.out, which is no activation of this run"),
        ({"step.0/out": np.zeros(3)}, r"patch of step.0/out, which is no activation"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(patch, message):
    with pytest.raises(TraceError, match=message):
        record(MODEL, TOKENS, patch=patch)


# ----------------------------------------------------------------------------------------------------------------- choosing


def test_taps_and_layers_choose():
    chosen = record(MODEL, TOKENS, steps=1, selection=Selection(taps=("*.q_rope", "logits"), layers=(1,)))
    names = ["layers.1.attention.q_rope", "logits"]
    assert list(chosen) == names + ["step.0/" + name for name in names]
    plain = record(MODEL, TOKENS, steps=1)
    for name, x in chosen.items():
        np.testing.assert_array_equal(x, plain[name])


def test_layers_are_read_as_people_write_them():
    assert parse_layers("0-3,7") == (0, 1, 2, 3, 7)
    assert parse_layers("2") == (2,)
    for text in ("", "1-", "-1", "3-1", "a", "1,,2", "0x1"):
        with pytest.raises(TraceError, match="expected numbers and ranges, such as 0-3,7"):
            parse_layers(text)
    for text in ("0-999999999999", "10000"):  # without taking memory for each
        with pytest.raises(TraceError, match="expected numbers below 10,000"):
            parse_layers(text)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(taps=("*.q_ropes",)), r"no activation fits '\*\.q_ropes'"),
        (Selection(layers=(0, 2)), r"layer 2 is not in this model, which has layers 0 to 1"),
        (Selection(taps=("layers.0.*",), layers=(1,)), r"taps and layers together select no activation"),
    ],
)
def test_a_choice_of_nothing_is_refused_before_anything_is_written(tmp_path, selection, message):
    with pytest.raises(TraceError, match=message):
        write_trace(MODEL, TOKENS, tmp_path / "t", selection=selection)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("storage", ["npy", "raw"])
def test_a_trace_read_back_is_what_was_recorded(tmp_path, storage, precision):
    precision = Precision(precision)
    recorded = record(MODEL, TOKENS, steps=[3, 4], precision=precision)
    write_trace(MODEL, TOKENS, tmp_path / "t", steps=[3, 4], precision=precision, storage=storage)
    trace = read_trace(tmp_path / "t")
    assert list(trace) == list(recorded)
    for name, x in recorded.items():
        assert isinstance(trace[name], np.memmap)
        assert not trace[name].flags.writeable
        assert trace[name].dtype == ("float32" if storage == "raw" else x.dtype)
        np.testing.assert_array_equal(trace[name], x.astype(trace[name].dtype), err_msg=name)
        file = tmp_path / "t" / (name + (".f32" if storage == "raw" else ".npy"))
        entry = trace.meta["activations"][name]
        assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert trace.hash_matches(name)
        if storage == "raw":
            assert file.read_bytes() == x.astype("<f4").tobytes()
    assert trace.meta["tokens"] == TOKENS.tolist()
    assert trace.meta["steps"] == [[3], [4]]
    assert trace.meta["precision"] == precision.name
    assert trace.meta["convention"] == ("meta" if precision.name == "bfloat16" else None)
    assert trace.meta["model"] == {"path": None, "manifest_sha256": None, "config": CONFIG.to_dict()}
    assert trace.meta["selection"] == {"taps": None, "layers": None}


@pytest.mark.parametrize("storage", ["npy", "raw"])
def test_an_array_in_another_order_is_stored_in_c_order(tmp_path, storage):
    x = tiny.uniform(1, (3, 4))
    with new_trace(tmp_path / "t", storage=storage) as writer:
        writer.add("norm", x.T)
        writer.describe("test", [1], [], Precision(), {})
    trace = read_trace(tmp_path / "t")
    np.testing.assert_array_equal(trace["norm"], x.T)
    file = tmp_path / "t" / trace.meta["activations"]["norm"]["file"]
    assert file.read_bytes()[-x.nbytes :] == np.ascontiguousarray(x.T).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_byte_order_is_the_machine_s_in_memory_and_the_header_s_on_disk(tmp_path, dtype):
    x = tiny.uniform(1, (3, 4)).astype(dtype)
    with new_trace(tmp_path / "t") as writer:
        writer.add("norm", tiny.byte_swapped(x))
        writer.describe("test", [1], [], Precision(), {})
    file = tmp_path / "t" / "norm.npy"
    assert file.read_bytes()[-x.nbytes :] == x.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    for order in "<>":  # as a machine of either writes it
        np.save(file, x.astype(np.dtype(dtype).newbyteorder(order)))
        found = read_trace(tmp_path / "t")["norm"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x)


def test_statistics_leave_out_masked_scores(tmp_path):
    trace = write_trace(MODEL, TOKENS, tmp_path / "t")
    for name, x in trace.items():
        entry, finite = trace.meta["activations"][name], np.asarray(x, np.float64)[np.isfinite(x)]
        assert entry["n_neg_inf"] == (CONFIG.n_heads * 21 if name.endswith("scores") else 0)  # 6 + 5 + ... + 1 later tokens
        assert (entry["n_nan"], entry["n_inf"]) == (0, 0)
        assert (entry["min"], entry["max"]) == (finite.min(), finite.max())
        np.testing.assert_allclose([entry["mean"], entry["rms"]], [finite.mean(), np.sqrt((finite**2).mean())], rtol=1e-12)


def test_numbers_that_are_not_finite_are_counted_and_json_stays_json(tmp_path):
    params = {**MODEL.params, "norm.weight": np.full(CONFIG.dim, np.nan, np.float32)}
    trace = write_trace(SimpleNamespace(config=CONFIG, params=params), TOKENS, tmp_path / "t")
    entry = trace.meta["activations"]["norm"]
    assert (entry["min"], entry["rms"], entry["n_nan"]) == (None, None, 7 * CONFIG.dim)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("storage", ["npy", "raw"])
def test_the_size_is_said_before_and_is_right(tmp_path, storage, precision):
    lines = []

    def report(line):
        assert not [*tmp_path.rglob("*.npy"), *tmp_path.rglob("*.f32")]
        lines.append(line)

    selection, precision = Selection(taps=("*out", "*scores", "logits")), Precision(precision)
    arguments = {"precision": precision, "selection": selection, "storage": storage}
    trace = write_trace(MODEL, [[5, 9, 2]], tmp_path / "t", steps=2, report=report, **arguments)
    found = [(trace.path / entry["file"]).stat().st_size for entry in trace.meta["activations"].values()]
    assert (len(found), sum(found)) == trace_size(CONFIG, [[5, 9, 2]], 2, **arguments)
    assert len(lines) == 1
    assert lines[0].startswith("27 activations, ")


def test_an_existing_trace_stays_unless_forced_and_anything_else_stays_always(tmp_path):
    first = write_trace(MODEL, TOKENS, tmp_path / "t")
    with pytest.raises(ValueError, match="t exists"):
        write_trace(MODEL, [1], tmp_path / "t")
    assert read_trace(tmp_path / "t").meta == first.meta
    write_trace(MODEL, [1], tmp_path / "t", force=True)
    assert read_trace(tmp_path / "t").meta["tokens"] == [1]
    (tmp_path / "t" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.txt"):
        write_trace(MODEL, [1], tmp_path / "t", force=True)
    assert (tmp_path / "t" / "thesis.txt").exists()


@pytest.mark.parametrize("foreign", [".git/HEAD", "layers.0.attention/.mine", "empty/"])
def test_force_keeps_what_is_hidden_in_a_trace_too(tmp_path, foreign):
    write_trace(MODEL, TOKENS, tmp_path / "t", storage="raw")
    precious = tmp_path / "t" / foreign
    (precious if foreign.endswith("/") else precious.parent).mkdir(exist_ok=True)
    if not foreign.endswith("/"):
        precious.write_text("mine")
    with pytest.raises(ValueError, match=r"t is not replaced: it holds "):
        write_trace(MODEL, [1], tmp_path / "t", force=True)
    assert precious.exists()


@pytest.mark.parametrize("storage", ["npy", "raw"])
def test_a_write_cut_short_names_its_file(tmp_path, storage):
    with full_disk(3000), pytest.raises(TraceError) as raised:
        write_trace(MODEL, TOKENS, tmp_path / "t", storage=storage, selection=Selection(taps=("logits",)))
    assert str(raised.value) == f"{tmp_path / 't' / 'logits'}.{'npy' if storage == 'npy' else 'f32'}: File too large"
    assert not any(tmp_path.iterdir())


def test_an_interrupted_trace_leaves_nothing(tmp_path):
    class Params(dict):
        def __getitem__(self, name):
            if name == "layers.1.ffn_norm.weight":
                raise KeyboardInterrupt
            return super().__getitem__(name)

    with pytest.raises(KeyboardInterrupt):
        write_trace(SimpleNamespace(config=CONFIG, params=Params(MODEL.params)), TOKENS, tmp_path / "t")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("npllama.golden.trace.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TraceError, match=r"the trace needs 0\.1 MB, but only 1\.0 kB are free"):
        write_trace(MODEL, TOKENS, tmp_path / "t")
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- bad traces


@pytest.fixture
def trace_path(tmp_path):
    write_trace(MODEL, [1, 2], tmp_path / "t", selection=Selection(taps=("norm",)))
    return tmp_path / "t"


def change_meta(path, change):
    meta = json.loads((path / "trace.json").read_text())
    change(meta)
    (path / "trace.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda meta: meta.update(format="npllama trace 2"),
            r"trace\.json: format 'npllama trace 2', expected 'npllama trace 1'",
        ),
        (lambda meta: meta.pop("steps"), r"trace\.json: missing steps"),
        (lambda meta: meta.update(storage="zip"), r"expected storage npy or raw"),
        (lambda meta: meta["activations"]["norm"].pop("shape"), r"activation norm lacks shape"),
        (lambda meta: meta["activations"].update(norm=3), r"activation norm lacks file"),
        (lambda meta: meta["activations"]["norm"].update(dtype="object"), r"activation norm has dtype 'object'"),
        (lambda meta: meta["activations"]["norm"].update(shape=[2, -1]), r"activation norm has shape \[2, -1\]"),
        (lambda meta: meta["activations"]["norm"].update(file="../norm.npy"), r"which is outside the trace"),
        (lambda meta: meta["activations"]["norm"].update(file="/etc/passwd"), r"which is outside the trace"),
    ],
)
def test_a_trace_json_that_is_not_one_is_refused(trace_path, change, message):
    change_meta(trace_path, change)
    with pytest.raises(TraceError, match=message):
        read_trace(trace_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_garbage_for_trace_json_is_refused(trace_path, content):
    (trace_path / "trace.json").write_bytes(content)
    with pytest.raises(TraceError, match=r"trace\.json (is not JSON: |holds list, expected)"):
        read_trace(trace_path)


def test_no_trace_at_all_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"nothing/trace\.json is missing$"):
        read_trace(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("storage", "damage"),
    [(storage, damage) for storage in ("npy", "raw") for damage in ("missing", "empty", "cut")]
    + [("npy", damage) for damage in ("other shape", "other dtype", "pickle")],
)
def test_a_damaged_file_is_named_when_it_is_read(tmp_path, storage, damage):
    trace = write_trace(MODEL, [1, 2], tmp_path / "t", selection=Selection(taps=("norm",)), storage=storage)
    file = tmp_path / "t" / ("norm.npy" if storage == "npy" else "norm.f32")
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 4)
    else:
        new = {"other shape": np.zeros((1, 2), "f4"), "other dtype": trace["norm"].astype("f8"), "pickle": np.array([{}])}
        with open(file, "wb") as stream:
            np.save(stream, new[damage], allow_pickle=True)
    assert "norm" in trace
    with pytest.raises(TraceError, match=file.name):
        trace["norm"]


def test_a_changed_number_is_told_by_its_hash(trace_path):
    trace = read_trace(trace_path)
    assert trace.hash_matches("norm")
    content = bytearray((trace_path / "norm.npy").read_bytes())
    content[-1] ^= 1
    (trace_path / "norm.npy").write_bytes(content)
    assert not trace.hash_matches("norm")
    assert trace["norm"].shape == (2, CONFIG.dim)
    (trace_path / "norm.npy").unlink()
    with pytest.raises(TraceError, match=r"norm\.npy"):
        trace.hash_matches("norm")


def test_more_than_the_context_holds_is_refused_before_the_size_is_said(tmp_path):
    lines = []
    with pytest.raises(ValueError, match="513 tokens do not fit the model's context of 512"):
        write_trace(MODEL, [1] * 500, tmp_path / "t", steps=13, report=lines.append)
    assert not lines
    assert len(record(MODEL, [[-1, -1, 5]], steps=3 * [1], selection=Selection(taps=("norm",)))) == 4


@pytest.mark.parametrize("steps", [-1, "2", 1.5, [[1, 2]], None, [131]], ids=str)
def test_steps_that_are_neither_a_number_nor_ids_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps|vocabulary"):
        record(MODEL, TOKENS, steps=steps)
