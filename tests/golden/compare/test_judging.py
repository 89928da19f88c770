"""Test the judgement: tolerances, masks, parts of a trace, and whose noise counts."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from npllama.checkpoint import create, load
from npllama.config import parameter_shapes
from npllama.golden.compare import compare
from npllama.golden.compare.judging import relative_error
from npllama.golden.precision import Precision
from npllama.golden.trace import Selection, write_trace

from candidates import TOKENS, run, save_npz


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
    """Refuse the candidate as noise trace: each of its mistakes would excuse itself."""
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


def test_what_is_not_finite_in_both_counts_for_nothing():
    r = np.array([3.0, 4.0, np.nan, 1.0])
    assert relative_error(np.array([3.0, 4.5, 1.0, np.inf]), r) == pytest.approx(0.1, rel=1e-15)
    assert relative_error(np.zeros(2), np.zeros(2)) == np.inf
