"""compare(): every container and every kind of failure, by its exit status and its line."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from npllama.golden.compare import compare, html
from npllama.golden.compare.inputs import read_activations
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision
from npllama.golden.trace import record, write_trace

import tiny
from candidates import TOKENS, run, save_npz

# ------------------------------------------------------------------------------------------------------------- containers


def save_npy(folder, arrays):
    for name, x in arrays.items():
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "mine" / f"{name}.npy", x)
    return folder / "mine"


def save_raw(folder, arrays):
    for name, x in arrays.items():
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        x.astype("<f4").tofile(folder / "mine" / f"{name}.f32")
    (folder / "mine" / "shapes.json").write_text(json.dumps({name: x.shape for name, x in arrays.items()}))
    return folder / "mine"


def save_safetensors(folder, arrays):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    safetensors.save_file(arrays, folder / "mine.safetensors")
    return folder / "mine.safetensors"


CONTAINERS = [save_npz, save_npy, save_raw, save_safetensors]


@pytest.mark.parametrize("save", CONTAINERS)
def test_every_container_is_read(save, traces, arrays, tmp_path, capsys):
    status, out, _ = run(capsys, traces / "reference", save(tmp_path, arrays))
    assert (status, out.splitlines()[0][:23]) == (0, "equal within rounding: ")
    assert f"{len(arrays)} activations" in out.splitlines()[0]


@pytest.mark.parametrize("save", CONTAINERS)
def test_one_wrong_number_is_found_in_every_container(save, traces, arrays, tmp_path, capsys):
    arrays["step.0/layers.1.attention.v"][0, 1, 3] *= 2
    status, out, _ = run(capsys, traces / "reference", save(tmp_path, arrays))
    assert status == 1
    assert out.startswith("first divergence: step.0/layers.1.attention.v (relative error ")
    assert sum("different" in line and line.startswith("step.0/") for line in out.splitlines()) == 1


@pytest.mark.parametrize("save", [save_npz, save_npy])
def test_either_byte_order_is_read(save, traces, arrays, tmp_path, capsys):
    path = save(tmp_path, {name: tiny.byte_swapped(x) for name, x in arrays.items()})
    assert run(capsys, traces / "reference", path)[0] == 0
    for name, x in read_activations(path).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, arrays[name])


def test_raw_traces_are_read(traces, capsys):
    assert run(capsys, traces / "reference", traces / "raw")[0] == 0


@pytest.mark.torch
def test_bfloat16_safetensors_are_widened_and_judged_as_bfloat16(model, traces, tmp_path, capsys):
    import torch

    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    trace = write_trace(model, TOKENS, tmp_path / "simulated", steps, Precision("bfloat16"))
    safetensors.save_file({n: torch.from_numpy(np.array(x)).bfloat16() for n, x in trace.items()}, tmp_path / "b.safetensors")
    found = compare(traces / "reference", tmp_path / "b.safetensors", model=model)
    assert (found.precision, found.equal) == ("bfloat16", True), found.verdict
    strict = compare(traces / "reference", tmp_path / "b.safetensors", model=model, precision="float32")
    assert strict.first.name == "tok_embeddings"


def save_one_in_bfloat16(folder, arrays):
    import torch

    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    tensors["layers.1.attention.weights"] = tensors["layers.1.attention.weights"].bfloat16()
    safetensors.save_file(tensors, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def save_one_in_float16(folder, arrays):
    name = "layers.1.attention.weights"
    return save_npz(folder, {**arrays, name: arrays[name].astype(np.float16)})


@pytest.mark.parametrize("save", [save_one_in_float16, pytest.param(save_one_in_bfloat16, marks=pytest.mark.torch)])
def test_one_16_bit_array_is_no_excuse_for_the_others(save, model, traces, tmp_path, capsys):
    """Find a wrong eps, which 16 bits would hide, when only one activation has 16 bits."""
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    arrays = record(model, TOKENS, steps, Port("eps"))
    status, out, _ = run(capsys, traces / "reference", save(tmp_path, arrays))
    verdict = out.splitlines()[0]
    kind = save.__name__.removeprefix("save_one_in_")
    assert (status, verdict[:41]) == (1, "first divergence: layers.0.attention_norm")
    assert verdict.endswith(f"; judged as float32: of {len(arrays)} activations 1 is stored as {kind}")
    assert (
        "judged as"
        not in run(capsys, traces / "reference", save(tmp_path, arrays), "--precision", "bfloat16")[1].split("\n")[0]
    )


def test_the_precision_is_what_most_arrays_are_stored_in(traces, arrays, tmp_path):
    half = {name: x.astype(np.float16) if i % 2 else x for i, (name, x) in enumerate(arrays.items())}
    assert len(half) % 2 == 0
    assert read_activations(save_npz(tmp_path, half)).precision == "float32", "half of them are not most"
    wider = {name: x.astype(np.float64) if i else x for i, (name, x) in enumerate(arrays.items())}
    assert read_activations(save_npz(tmp_path, wider)).precision == "float32", "NumPy promotes in silence"
    wider = {name: x.astype(np.float64) for name, x in arrays.items()}
    assert read_activations(save_npz(tmp_path, wider)).precision == "float64"
    most = {name: x if name.endswith("logits") else x.astype(np.float16) for name, x in arrays.items()}
    found = compare(traces / "reference", save_npz(tmp_path, most))
    assert found.precision == "float16", "as Meta's code returns the logits in float32 whatever it computes in"
    assert found.verdict.endswith(f"; judged as float16: of {len(most)} activations 2 are stored as float32")


def test_a_batch_axis_of_one_is_dropped_and_a_real_batch_compared(model, traces, arrays, tmp_path, capsys):
    assert run(capsys, traces / "reference", save_npz(tmp_path, {name: x[None] for name, x in arrays.items()}))[0] == 0
    batch = np.stack([TOKENS, np.r_[[-1, -1, -1], TOKENS[:6]]])
    reference = write_trace(model, batch, tmp_path / "batch64", 2, Precision("float64"))
    mine = write_trace(model, batch, tmp_path / "batch", reference.meta["steps"])
    found = compare(reference.path, mine.path, model=model)
    assert found.equal, found.verdict
    spoiled = {name: np.array(x) for name, x in mine.items()}
    spoiled["layers.0.attention.q"][1, 1] = np.nan  # padding: no one's concern
    assert compare(reference.path, save_npz(tmp_path, spoiled), model=model).equal
    spoiled["layers.0.attention.q"][1, 3] = 0.5
    assert compare(reference.path, save_npz(tmp_path, spoiled), model=model).first.judged.token == 9 + 3


def test_paddings_noise_is_no_excuse(model, tmp_path):
    """Ignore padding, most tokens here: RoPE at its position is all noise."""
    batch = np.full((2, 12), -1)
    batch[:, 9:] = TOKENS[:6].reshape(2, 3)
    reference = write_trace(model, batch, tmp_path / "reference", 0, Precision("float64"))
    spoiled = {name: np.array(x) for name, x in write_trace(model, batch, tmp_path / "mine").items()}
    assert compare(reference.path, save_npz(tmp_path, spoiled), model=model).equal
    spoiled["layers.0.attention.q_rope"][1, 11] *= np.float32(1.001)
    found = compare(reference.path, save_npz(tmp_path, spoiled), model=model)
    assert (found.first.name, found.first.judged.token) == ("layers.0.attention.q_rope", 12 + 11)


# --------------------------------------------------------------------------------------------------------------- failures


def nan(arrays):
    arrays["layers.1.ffn_norm"][3, 5] = np.nan


def infinite(arrays):
    arrays["layers.1.ffn_norm"][3, 5] = np.inf


def negative_infinite(arrays):
    arrays["layers.1.ffn_norm"][3, 5] = -np.inf


def unmasked(arrays):
    arrays["layers.1.attention.scores"][2, 3, 4] = 0.25


def hidden(arrays):
    arrays["layers.1.attention.scores"][2, 3, 2] = -np.inf


def missing(arrays):
    del arrays["layers.1.ffn_norm"]


def unmatched(arrays):
    arrays["layers.1.fnn_norm"] = arrays.pop("layers.1.ffn_norm")


def extra(arrays):
    arrays["layers.2.ffn_norm"] = arrays["layers.1.ffn_norm"]


def other_shape(arrays):
    arrays["layers.1.ffn_norm"] = arrays["layers.1.ffn_norm"][:, :-1]


def empty(arrays):
    arrays["layers.1.ffn_norm"] = arrays["layers.1.ffn_norm"][:0]


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (nan, "first divergence: layers.1.ffn_norm (relative error * 1 NaN, the first at [3, 5]"),
        (infinite, "first divergence: layers.1.ffn_norm (relative error * 1 infinite, the first at [3, 5]"),
        (negative_infinite, "first divergence: layers.1.ffn_norm (relative error * 1 infinite, the first at [3, 5]"),
        (
            unmasked,
            "first divergence: layers.1.attention.scores (relative error * not masked in the candidate, the first at [2, 3, 4]",
        ),
        (
            hidden,
            "first divergence: layers.1.attention.scores (relative error * not masked in the reference, the first at [2, 3, 2]",
        ),
        (missing, "incomplete: layers.1.ffn_norm is missing from the candidate"),
        (unmatched, "incomplete: layers.1.ffn_norm is missing from the candidate"),
        (extra, "incomplete: layers.2.ffn_norm is not in the reference"),
        (other_shape, "first divergence: layers.1.ffn_norm (shape [9, 95], expected [9, 96])"),
        (empty, "first divergence: layers.1.ffn_norm (shape [0, 96], expected [9, 96])"),
    ],
)
def test_what_no_number_shows_is_a_difference_with_its_name(spoil, verdict, traces, arrays, tmp_path, capsys):
    spoil(arrays)
    status, out, _ = run(capsys, traces / "reference", save_npz(tmp_path, arrays))
    start, _, end = verdict.partition(" * ")
    assert status == 1
    assert out.splitlines()[0].startswith(start)
    assert out.splitlines()[0].endswith(end)


def test_other_names_ask_for_a_map(traces, arrays, tmp_path, capsys):
    path = save_npz(tmp_path, {f"model.{name}": arrays[name] for name in ("logits", "norm")})
    status, out, _ = run(capsys, traces / "reference", path)
    names = "tok_embeddings in the reference, model.logits in the candidate"
    assert (status, out.splitlines()[0]) == (1, f"different: no name in common ({names}): is a --map missing?")


def test_a_wrong_map_is_said_and_not_that_the_numbers_differ(traces, arrays, tmp_path, capsys):
    path = save_npz(tmp_path, {name: arrays[name] for name in ("logits", "norm")})
    status, out, _ = run(capsys, traces / "reference", path, "--map", "hf")
    first = out.splitlines()[0]
    assert status == 1
    assert first.startswith("nothing to compare: the map hf gives no name of the reference (")
    assert first.endswith("): is it the map of another program?")


def test_an_unmatched_name_is_listed_too(traces, arrays, tmp_path):
    unmatched(arrays)
    found = compare(traces / "reference", save_npz(tmp_path, arrays))
    assert [row.name for row in found.rows if not row.passed] == ["layers.1.ffn_norm", "layers.1.fnn_norm"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_truncated_file_is_unusable_and_named(traces, arrays, tmp_path, capsys):
    damaged = [
        (save_npy(tmp_path / "a", arrays) / "norm.npy", None),
        (save_raw(tmp_path / "b", arrays) / "norm.f32", None),
        (shutil.copytree(traces / "mine", tmp_path / "c") / "norm.npy", None),
        (shutil.copytree(traces / "raw", tmp_path / "d") / "norm.f32", None),
    ]
    for file, _ in damaged:
        cut(file)
        status, out, err = run(capsys, traces / "reference", file.parent)
        assert (status, out) == (2, "")
        assert str(file) in err
        assert err.count("\n") == 1
    (tmp_path / "e").mkdir()
    npz = save_npz(tmp_path / "e", arrays)
    cut(npz)
    status, out, err = run(capsys, traces / "reference", npz)
    assert (status, out, str(npz) in err) == (2, "", True)


def test_truncated_safetensors_are_unusable(traces, arrays, tmp_path, capsys):
    file = save_safetensors(tmp_path, arrays)
    cut(file)
    status, _, err = run(capsys, traces / "reference", file)
    assert (status, str(file) in err) == (2, True)


def test_unusable_input_says_why(traces, tmp_path, capsys):
    nothing, shapeless, other, one = (tmp_path / name for name in ("nothing", "shapeless", "notes.txt", "one.npz"))
    nothing.mkdir()
    shapeless.mkdir()
    (shapeless / "norm.f32").write_bytes(bytes(16))
    other.write_text("")
    np.savez(one, **{"else": np.ones(3)})
    ids = tmp_path / "ids.npz"
    np.savez(ids, norm=np.arange(3))
    for candidate, message in [
        (tmp_path / "absent", "not found"),
        (nothing, "empty"),
        (shapeless, "shapes.json"),
        (other, "expected a trace directory"),
        (ids, "expected floating-point numbers"),
    ]:
        status, out, err = run(capsys, traces / "reference", candidate)
        assert (status, out, message in err) == (2, "", True), err
    status, _, err = run(capsys, traces / "reference", one, "--partial")
    assert (status, "no activation in common" in err) == (2, True)
    assert run(capsys, traces / "reference", one)[0] == 1


def test_safetensors_need_no_package(traces, arrays, tmp_path, capsys, monkeypatch):
    file = save_safetensors(tmp_path, arrays)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    assert run(capsys, traces / "reference", file)[0] == 0


def zipped(path, name, data=b"x", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)


BAD_INPUTS = {
    "a member that is no array": ("x.npz", lambda path: zipped(path, "norm")),
    "a member of nonsense": ("x.npz", lambda path: zipped(path, "norm.npy")),
    "a bomb": ("x.npz", lambda path: zipped(path, "norm.npy", bytes(80 << 20), zipfile.ZIP_DEFLATED)),
    "a newline in a name": ("x.npz", lambda path: zipped(path, "no\nrm.npy")),
    "no name": ("x.npz", lambda path: zipped(path, ".npy")),
    "a long name": ("x.npz", lambda path: zipped(path, "x" * 300 + ".npy")),
    "an npy that is a zip": ("x/norm.npy", lambda path: zipped(path, "norm.npy")),
    "an npy of nonsense": ("x/norm.npy", lambda path: path.write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': (((((((")),
    "a nested trace": ("x/trace.json", lambda path: path.write_text("[" * 10**5)),
    "nested shapes": ("x/shapes.json", lambda path: path.write_text('{"norm": ' + "[" * 10**5)),
    "shapes of text": ("x/shapes.json", lambda path: path.write_text('{"norm": ["a"]}')),
    "safetensors of nonsense": ("x.safetensors", lambda path: path.write_bytes(b"\x10" + bytes(7) + b"[" * 16)),
}


@pytest.mark.parametrize("fault", BAD_INPUTS)
def test_a_damaged_input_is_one_line_and_status_2(fault, traces, tmp_path, capsys):
    name, write = BAD_INPUTS[fault]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "norm.f32").write_bytes(bytes(4)) if path.name == "shapes.json" else None
    write(path)
    status, out, err = run(capsys, traces / "reference", tmp_path / Path(name).parts[0])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("noise", [], "the noise of 'tok_embeddings' is [], expected rms and max by precision"),
        ("noise", {"float32": {"rms": "a", "max": 1}}, "the noise of 'tok_embeddings' is {'float32': {"),
        ("noise", {"float32": {"rms": float("nan"), "max": 1}}, "the noise of 'tok_embeddings' is"),
        ("file", 3, "activation tok_embeddings has file 3, expected a name"),
        ("shape", [2**70], "activation tok_embeddings has shape [1180591620717411303424], expected positive numbers"),
    ],
)
def test_a_trace_that_says_impossible_things_of_an_activation_is_refused(key, value, message, traces, tmp_path, capsys):
    shutil.copytree(traces / "reference", tmp_path / "copy")
    meta = json.loads((tmp_path / "copy" / "trace.json").read_text())
    meta["activations"]["tok_embeddings"][key] = value
    (tmp_path / "copy" / "trace.json").write_text(json.dumps(meta))
    status, out, err = run(capsys, tmp_path / "copy", traces / "reference")
    assert (status, out) == (2, "")
    assert f"trace.json: {message}" in err


def test_other_tokens_are_no_comparison(model, traces, tmp_path, capsys):
    write_trace(model, TOKENS[::-1], tmp_path / "other", [[1]])
    status, _, err = run(capsys, traces / "reference", tmp_path / "other")
    assert (status, "its tokens are" in err) == (2, True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("precision", "int4", "precision is 'int4', expected float64, float32, bfloat16, float16"),
        ("convention", "x", "convention is 'x', expected meta, hf or null"),
        ("tokens", [1, 2, 3], "has tokens of shape [3], but in"),
        ("tokens", [], "tokens is [], expected a list of token ids"),
        ("tokens", [[1, 2], [3]], "tokens is [[1, 2], [3]], expected"),
        ("tokens", [1, "2", 3], "tokens is [1, '2', 3], expected"),
        ("tokens", 7, "tokens is 7, expected"),
        ("steps", 1, "steps is 1, expected a list with 1 token id for each step"),
        ("steps", [[1, 2]], "steps is [[1, 2]], expected"),
        ("steps", [["a"]], "steps is [['a']], expected"),
        ("steps", [], "has 0 steps, but in"),
        ("model", 5, "model is 5, expected its path"),
        ("model", {"path": 5}, 'model is {"path": 5}, expected its path'),
        ("model", {"path": None, "config": {"dim": 96}}, "the model's config: missing n_layers"),
    ],
)
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_trace_that_says_impossible_things_of_its_run_is_refused(side, key, value, message, traces, arrays, tmp_path, capsys):
    """Refuse either trace in one line that names its trace.json; the other has none to disagree with."""
    for name in ("reference", "mine"):
        shutil.copytree(traces / name, tmp_path / name)
    broken, other = ("reference", "mine") if side == "reference" else ("mine", "reference")
    file = tmp_path / broken / "trace.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {key: value if key != "model" or value == 5 else {**meta["model"], **value}}))
    (tmp_path / other / "trace.json").unlink()
    status, out, err = run(capsys, tmp_path / "reference", tmp_path / "mine")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert str(file) in err
    assert message.partition('{"path": 5')[0] in err


def test_tokens_that_the_given_model_lacks_are_said_with_their_file(model, traces, tmp_path, capsys):
    meta = json.loads((traces / "mine" / "trace.json").read_text())
    mine = shutil.copytree(traces / "mine", tmp_path / "mine")
    (mine / "trace.json").write_text(json.dumps({**meta, "tokens": [10**6] * len(TOKENS)}))
    reference = shutil.copytree(traces / "reference", tmp_path / "reference")
    meta = json.loads((reference / "trace.json").read_text())
    (reference / "trace.json").write_text(json.dumps({**meta, "tokens": [10**6] * len(TOKENS)}))
    with pytest.raises(ValueError, match=r"reference.trace\.json: token id 1000000 is outside the vocabulary"):
        compare(reference, mine)
    (reference / "trace.json").unlink()
    with pytest.raises(ValueError, match=r"mine.trace\.json: token id 1000000 is outside the vocabulary"):
        compare(reference, mine, model=model)


def test_a_trace_judges_arrays_with_a_batch_axis_of_one(model, traces, tmp_path):
    """Compare a candidate whose trace.json has one sequence's tokens with reference arrays that are a batch of one."""
    shutil.copytree(traces / "reference", tmp_path / "reference")
    arrays = {
        f.relative_to(tmp_path / "reference").as_posix()[:-4]: np.load(f) for f in (tmp_path / "reference").rglob("*.npy")
    }
    reference = save_npz(tmp_path, {name: x[None] for name, x in arrays.items()})
    batch = write_trace(
        model, TOKENS[None], tmp_path / "batch", json.loads((traces / "mine" / "trace.json").read_text())["steps"]
    )
    file = batch.path / "trace.json"
    file.write_text(json.dumps({**batch.meta, "tokens": TOKENS.tolist()}))
    found = compare(reference, batch.path, model=model)
    assert found.equal, found.verdict
    assert found.noise.source.startswith("measured")


def test_a_hash_that_does_not_match_is_a_warning(traces, arrays, tmp_path, capsys):
    mine = shutil.copytree(traces / "mine", tmp_path / "mine")
    np.save(mine / "norm.npy", np.nextafter(arrays["norm"], np.float32(np.inf)))
    status, out, _ = run(capsys, traces / "reference", mine)
    assert status == 0
    assert "warning: " in out
    assert "norm does not match its sha256 in trace.json" in out


def test_the_logits_line_is_of_the_worst_pass(traces, arrays, tmp_path, capsys):
    arrays["step.0/logits"] = arrays["step.0/logits"][..., ::-1]
    _, out, _ = run(capsys, traces / "reference", save_npz(tmp_path, arrays))
    [line] = [line for line in out.splitlines() if "KL divergence" in line]
    assert line.startswith("step.0/logits, the worst of 2 passes: KL divergence ")
    assert "the same first choice 0.0%" in line


def test_missing_is_counted_as_missing(traces, arrays, tmp_path, capsys):
    del arrays["layers.1.ffn_norm"], arrays["layers.1.feed_forward.up"]
    found = compare(traces / "reference", path := save_npz(tmp_path, arrays))
    assert [row.name for row in found.missing] == ["layers.1.ffn_norm", "layers.1.feed_forward.up"]
    status, out, _ = run(capsys, traces / "reference", path)
    assert status == 1
    assert out.splitlines()[0].endswith("is missing from the candidate, and 1 more; what both have is equal")
    assert f"{len(found.rows)} activations, 0 different, 2 missing; --all shows every one" in out
    page = html.page(found)
    assert page.count('<tr class="missing">') == 2
    assert "failed" not in page.partition("<body>")[2]


def test_a_culprit_is_marked_otherwise_than_what_follows_from_it(model, traces, tmp_path):
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    write_trace(model, TOKENS, tmp_path / "mine", steps, Port("no_silu"))
    found = compare(traces / "reference", tmp_path / "mine", model=model)
    culprits = [row.name for row in found.rows if found.is_culprit(row)]
    assert culprits == found.wrong_by_themselves
    assert culprits == [f"{step}layers.{i}.feed_forward.act" for step in ("", "step.0/") for i in (0, 1)]
    different = sum(not row.passed for row in found.rows)
    page = html.page(found)
    assert [page.count(f'<tr class="{kind}">') for kind in ("culprit", "failed")] == [4, different - 4]
    assert [page.count(f'class="dot-{kind}"') for kind in ("bad", "after")] == [4, different - 4]
    assert page.count("<td>wrong by itself</td>") == 4


def test_arrays_of_whole_numbers_are_skipped_aloud(traces, arrays, tmp_path):
    ids = {"ids": np.arange(3), "norm.mask": np.ones(2, bool)}
    found = compare(traces / "reference", save_npz(tmp_path, {**arrays, **ids}))
    assert found.equal, found.verdict
    [warning] = found.warnings
    assert warning.endswith("ids and 1 more hold whole numbers: not compared (bfloat16: as float32)")
