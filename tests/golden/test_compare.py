"""compare(): every container and every kind of failure, by its exit status and its line."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint import create, load
from npllama.cli import main
from npllama.config import parameter_shapes
from npllama.golden.compare import compare
from npllama.golden.compare.inputs import read_activations
from npllama.golden.compare.text import in_layers, ranges
from npllama.golden.mistakes import Port
from npllama.golden.precision import Precision
from npllama.golden.trace import Selection, record, write_trace

import broken_ports
import tiny
from system import full_disk

TOKENS = tiny.random_tokens(broken_ports.CONFIG, 2, 9)


@pytest.fixture(scope="module")
def model():
    return broken_ports.tiny_model()


@pytest.fixture(scope="module")
def traces(model, tmp_path_factory):
    """A float64 reference, a float32 candidate and a raw one, of a prompt and a step."""
    folder = tmp_path_factory.mktemp("traces")
    write_trace(model, TOKENS, folder / "reference", 1, Precision("float64"))
    steps = json.loads((folder / "reference" / "trace.json").read_text())["steps"]
    write_trace(model, TOKENS, folder / "mine", steps)
    write_trace(model, TOKENS, folder / "raw", steps, storage="raw")
    return folder


@pytest.fixture
def arrays(traces):
    """The candidate's activations, to be spoiled."""
    files = (traces / "mine").rglob("*.npy")
    return {file.relative_to(traces / "mine").as_posix()[:-4]: np.load(file) for file in files}


def run(capsys, *args: object) -> tuple[int, str, str]:
    status = main(["compare", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ------------------------------------------------------------------------------------------------------------- containers


def save_npz(folder, arrays):
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


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


def test_bfloat16_safetensors_are_widened_and_judged_as_bfloat16(model, traces, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    trace = write_trace(model, TOKENS, tmp_path / "simulated", steps, Precision("bfloat16"))
    safetensors.save_file({n: torch.from_numpy(np.array(x)).bfloat16() for n, x in trace.items()}, tmp_path / "b.safetensors")
    found = compare(traces / "reference", tmp_path / "b.safetensors", model=model)
    assert (found.precision, found.equal) == ("bfloat16", True), found.verdict
    strict = compare(traces / "reference", tmp_path / "b.safetensors", model=model, precision="float32")
    assert strict.first.name == "tok_embeddings"


def save_one_in_bfloat16(folder, arrays):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    tensors["layers.1.attention.weights"] = tensors["layers.1.attention.weights"].bfloat16()
    safetensors.save_file(tensors, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def save_one_in_float16(folder, arrays):
    name = "layers.1.attention.weights"
    return save_npz(folder, {**arrays, name: arrays[name].astype(np.float16)})


@pytest.mark.parametrize("save", [save_one_in_float16, save_one_in_bfloat16])
def test_one_16_bit_array_is_no_excuse_for_the_others(save, model, traces, tmp_path, capsys):
    """An eps that is wrong is hidden by 16 bits, but only one activation has them."""
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
    """RoPE at a padding token's position is all noise, and most tokens here are padding."""
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
        (missing, "different: layers.1.ffn_norm is missing from the candidate"),
        (unmatched, "different: layers.1.ffn_norm is missing from the candidate"),
        (extra, "different: layers.2.ffn_norm is not in the reference"),
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
    """In one line that names its trace.json, whichever of the two it is; the other has none to disagree with."""
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
    """The candidate's trace.json has one sequence's tokens, and the reference's arrays a batch of one."""
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


# --------------------------------------------------------------------------------------------------------------- judgement


def test_equal_traces_pass_and_one_unit_in_one_number_is_noise_but_no_equality(traces, arrays, tmp_path, capsys):
    same = save_npz(tmp_path, arrays)
    assert run(capsys, traces / "mine", same)[0] == 0
    assert run(capsys, traces / "mine", same, "--atol", 0, "--rtol", 0)[0] == 0
    for name in ("tok_embeddings", "layers.0.attention.scores", "layers.1.attention.weights", "step.0/logits"):
        changed = {n: x.copy() for n, x in arrays.items()}
        at = np.unravel_index(np.argmax(np.where(np.isfinite(changed[name]), np.abs(changed[name]), -1)), changed[name].shape)
        changed[name][at] = np.nextafter(changed[name][at], np.float32(np.inf))
        path = save_npz(tmp_path, changed)
        assert compare(traces / "mine", path).equal, name
        found = compare(traces / "mine", path, atol=0, rtol=0)
        assert found.exit_status == 1
        assert [row.name for row in found.rows if not row.passed] == [name]
        assert found.first.metrics.max_ulp == 1


def test_tolerances_are_numpys(traces, arrays, tmp_path):
    arrays["norm"] = arrays["norm"] + np.float32(1e-3) * np.sign(arrays["norm"])
    reference = np.load(traces / "reference" / "norm.npy")
    arrays["norm"][0, 0] = 2 * reference[0, 0]  # |c - r| is 1 · |r|, and 0.5 · |c|
    for atol, rtol in [(0, 0.6), (0, 1.01), (1e-3, 0), (1.1e-3, 0), (0, 1e-3), (5e-4, 1e-3), (1e-3, 1e-2), (0, 10.0)]:
        found = compare(traces / "reference", save_npz(tmp_path, arrays), atol=atol, rtol=rtol)
        norm = next(row for row in found.rows if row.name == "norm")
        assert norm.passed == np.allclose(arrays["norm"].astype(float), reference, atol=atol, rtol=rtol), (atol, rtol)


@pytest.mark.parametrize("option", ["--atol", "--rtol"])
@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_a_tolerance_that_judges_nothing_is_refused(option, value, traces, arrays, tmp_path, capsys):
    arrays["norm"] *= 2
    status, out, err = run(capsys, traces / "reference", save_npz(tmp_path, arrays), f"{option}={value}")
    assert (status, out) == (2, "")
    assert f"{option[2:]} is {value}, expected a finite number that is not below 0" in err


def test_finite_numbers_that_mask_are_masks(traces, arrays, tmp_path):
    for stand_in in (-1e9, np.finfo(np.float32).min, -1e4):
        for name, x in arrays.items():
            if name.endswith("scores"):
                x[np.isneginf(x) | (x <= -1e4)] = stand_in
        assert compare(traces / "reference", save_npz(tmp_path, arrays)).equal


def test_restricted_traces(model, traces, tmp_path, capsys):
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    chosen = Selection(taps=("*.q_rope", "logits"))
    write_trace(model, TOKENS, tmp_path / "part", steps, selection=chosen)
    write_trace(model, TOKENS, tmp_path / "part64", steps, Precision("float64"), chosen)
    assert run(capsys, tmp_path / "part64", tmp_path / "part")[0] == 0
    assert run(capsys, traces / "reference", tmp_path / "part")[0] == 1
    status, out, _ = run(capsys, traces / "reference", tmp_path / "part", "--partial")
    assert (status, "equal within rounding: 6 activations" in out) == (0, True)
    assert run(capsys, tmp_path / "part64", traces / "mine")[0] == 1
    assert run(capsys, tmp_path / "part64", traces / "mine", "--partial")[0] == 0


def test_the_noise_floor_can_come_from_a_trace(model, traces, arrays, tmp_path, capsys):
    steps = json.loads((traces / "reference" / "trace.json").read_text())["steps"]
    write_trace(model, TOKENS, tmp_path / "noise", steps, Precision("bfloat16"))
    mine = save_npz(tmp_path, {name: x * np.float32(1.001) for name, x in arrays.items()})
    assert run(capsys, traces / "reference", mine)[0] == 1
    status, out, _ = run(capsys, traces / "reference", mine, "--noise", tmp_path / "noise", "--precision", "bfloat16")
    assert status == 0
    assert str(tmp_path / "noise") in out
    status, _, err = run(capsys, traces / "reference", mine, "--noise", traces / "reference")
    assert (status, "equal to the reference" in err) == (2, True)


def test_the_candidate_is_no_noise_trace(model, traces, arrays, tmp_path, capsys):
    """Else each of its mistakes would be its own excuse."""
    wrong = save_npz(tmp_path, {name: x * np.float32(1.1) for name, x in arrays.items()})
    copy = shutil.copy(wrong, tmp_path / "copy.npz")
    for noise in (wrong, copy):
        status, out, err = run(capsys, traces / "reference", wrong, "--noise", noise)
        assert (status, out) == (2, "")
        assert f"{noise}: equal to the candidate" in err
        assert err.count("\n") == 1


def test_the_references_own_model_measures_the_noise(model, tmp_path, capsys):
    with create(tmp_path / "model", model.config, "float32", {"kind": "test"}) as writer:
        for name in parameter_shapes(model.config):
            writer.add(name, model.params[name])
    stored = load(tmp_path / "model")
    write_trace(stored, TOKENS, tmp_path / "reference", 0, Precision("float64"))
    write_trace(stored, TOKENS, tmp_path / "mine")
    _, out, _ = run(capsys, tmp_path / "reference", tmp_path / "mine")
    assert "measured: npllama in float32 against float64" in out
    manifest = tmp_path / "model" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    _, out, _ = run(capsys, tmp_path / "reference", tmp_path / "mine")
    assert "no longer the model that the reference is from" in out
    assert "default for float32" in out
    shutil.rmtree(tmp_path / "model")
    status, out, _ = run(capsys, tmp_path / "reference", tmp_path / "mine")
    assert (status, "can't be opened" in out) == (0, True)
    status, _, err = run(capsys, tmp_path / "reference", tmp_path / "mine", "-m", tmp_path / "absent")
    assert (status, "absent" in err) == (2, True)


# ------------------------------------------------------------------------------------------------------------------ output


def test_the_table_shows_the_first_failure_and_its_neighbours(traces, arrays, tmp_path, capsys):
    arrays["layers.1.attention.v"][0] = 0
    path = save_npz(tmp_path, arrays)
    _, out, _ = run(capsys, traces / "reference", path)
    assert sum(line.startswith(("layers.", "tok_", "norm", "logits ")) for line in out.splitlines()) == 7
    _, out, _ = run(capsys, traces / "reference", path, "--all")
    assert sum(line.split(" ")[0] in arrays for line in out.splitlines()) == len(arrays)
    assert "\033" not in out


def test_colour_only_where_it_is_wanted(traces, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in run(capsys, traces / "reference", traces / "mine")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(capsys, traces / "reference", traces / "mine")[1]


def test_the_report_for_machines(traces, arrays, tmp_path, capsys):
    arrays["layers.1.attention.v"][0, 0, 0] = np.nan
    arrays["layers.1.attention.weights"][0, 0, 5] = 0.1  # where the reference has an exact zero
    run(capsys, traces / "reference", save_npz(tmp_path, arrays), "--report", tmp_path / "x.json")
    report = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (report["equal"], report["first"]) == (False, "layers.1.attention.v")
    assert report["verdict"].startswith("first divergence: layers.1.attention.v")
    rows = {row["name"]: row for row in report["activations"]}
    assert set(rows) == set(arrays)
    assert rows["logits"]["metrics"].keys() >= {"max_abs", "max_rel", "rms", "nmse", "cosine", "max_ulp", "kl", "top1", "top5"}
    assert rows["norm"]["metrics"]["kl"] is None
    assert rows["layers.1.attention.weights"]["metrics"]["max_rel"] == "inf"
    assert rows["layers.1.attention.v"]["problem"].startswith("1 NaN")


def test_the_page_is_one_file_without_requests(traces, arrays, tmp_path, capsys):
    arrays["<script>"] = np.ones(3, np.float32)
    run(capsys, traces / "reference", save_npz(tmp_path, arrays), "--report", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert not any(word in page for word in ("http", "src=", "href", "url(", "@import", "<script"))
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 4, "a picture for each layer of the prompt and of the step"
    assert "prefers-color-scheme: dark" in page
    from xml.etree import ElementTree

    ElementTree.fromstring(
        page.partition("<!doctype html>")[2]
        .replace('<meta charset="utf-8">', "")
        .replace('<meta name="viewport" content="width=device-width">', "")
        .replace("<br>", "<br/>")
    )


def test_a_report_that_can_not_be_written_is_bad_usage(traces, tmp_path, capsys):
    for path, message in [(tmp_path / "x.txt", ".json or .html"), (tmp_path / "no" / "x.json", "No such file")]:
        status, _, err = run(capsys, traces / "reference", traces / "mine", "--report", path)
        assert (status, message in err) == (2, True)


def test_layers_are_drawn_together():
    assert ranges([0, 1, 2, 5]) == "0-2, 5"
    names = ["layers.0.attention.q", "layers.0.attention.k", "layers.1.attention.q", "layers.1.attention.k", "logits"]
    assert in_layers(names) == "attention.q, attention.k in layers 0-1; logits"


@pytest.mark.parametrize("name", ["x.json", "x.html"])
def test_a_report_that_is_not_whole_does_not_replace_the_last(traces, tmp_path, capsys, name):
    (tmp_path / name).write_text("the last")
    with full_disk(1000):
        status, _, err = run(capsys, traces / "reference", traces / "mine", "--report", tmp_path / name)
    assert (status, err) == (2, f"npllama compare: {tmp_path / name}: File too large\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "the last")]
