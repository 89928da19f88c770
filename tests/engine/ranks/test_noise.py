"""Compare ranks, which sum in another order, with one process: within the noise floor of `npllama compare`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from npllama import Config, KVCache
from npllama.checkpoint import Model
from npllama.golden.bundle import write_golden
from npllama.golden.compare import compare
from npllama.golden.conformance.grading import run_functions
from npllama.golden.precision import Precision, profile
from npllama.golden.trace import read_trace, write_trace

import tiny

STEPS = [3, 4]


@pytest.fixture
def models(spread):
    """Return a model of one process, the same over five ranks, these ranks, and tokens."""
    config = tiny.CONFIGS["one_kv_head"]
    params, tokens = tiny.random_params(config, 1), tiny.random_tokens(config, 2, 9).tolist()
    found, ranks = spread(params, config, 5)
    return Model(config, params), Model(config, found), ranks, tokens


def wrong(everyones):
    """Return the function that shows a rank's numbers to all, with an error of 1 % in its own."""
    return lambda x: everyones(x * x.dtype.type(1.01))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16-hf"])
def test_the_order_of_sums_is_within_the_noise(models, precision, tmp_path):
    """Judge every activation, in a prompt and decode steps; an error of 1 % on one rank is beyond the noise."""
    one, several, ranks, tokens = models
    write_trace(one, tokens, tmp_path / "one", STEPS, precision=profile(precision))
    write_trace(several, tokens, tmp_path / "ranks", STEPS, precision=profile(precision))
    found = compare(tmp_path / "one", tmp_path / "ranks", model=one)
    assert found.exit_status == 0, found.verdict
    if precision == "float32":
        ranks[-1].everyones = wrong(ranks[-1].everyones)
        write_trace(several, tokens, tmp_path / "wrong", STEPS)
        assert compare(tmp_path / "one", tmp_path / "wrong", model=one).exit_status == 1


def test_several_ranks_measure_the_noise_of_one_process(models, tmp_path):
    """Compare a right and a wrong trace with the model on ranks: floors and verdict are those of one process."""
    one, several, _, tokens = models
    write_trace(one, tokens, tmp_path / "exact", STEPS, precision=Precision("float64"))
    write_trace(one, tokens, tmp_path / "right", STEPS)
    params = {**one.params, "layers.0.attention.wo.weight": one.params["layers.0.attention.wo.weight"] * np.float32(1.01)}
    write_trace(Model(one.config, params), tokens, tmp_path / "wrong", STEPS)
    for candidate, status in (("right", 0), ("wrong", 1)):
        expected, found = (compare(tmp_path / "exact", tmp_path / candidate, model=model) for model in (one, several))
        assert found.exit_status == expected.exit_status == status
        assert (found.first and found.first.name) == (expected.first and expected.first.name)
        assert found.hints == expected.hints
        for kind in ("accumulated", "local"):
            floors, others = getattr(expected.noise, kind), getattr(found.noise, kind)
            assert floors.keys() == others.keys()
            for name, floor in floors.items():
                if np.median(floor.rms) > 0:
                    assert 0.2 < np.median(others[name].rms) / np.median(floor.rms) < 5, name


def test_a_golden_bundle_of_several_ranks(models, tmp_path):
    """Write a bundle over ranks: float64 within rounding of one process's, noise of its size, and the whole weights."""
    one, several, _, tokens = models
    bundles = [
        write_golden(model, tokens, tmp_path / name, STEPS, weights=True) for model, name in ((one, "a"), (several, "b"))
    ]
    expected, found = bundles
    assert list(found) == list(expected)
    for name in expected:
        kept = np.isfinite(expected[name])
        rounding = 1e-13 if expected[name].dtype == np.float64 else 1.2e-7
        largest = np.abs(expected[name][kept]).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=rounding * largest, err_msg=name)
        for precision in ("float32", "bfloat16"):
            a, b = (bundle.meta["activations"][name]["noise"][precision]["rms"] for bundle in (expected, found))
            assert a == b == 0 or 0.2 < b / a < 5, (name, precision)
    assert found.meta["weights"] == expected.meta["weights"], "the same files, by their sha256"


def test_weights_of_a_share_alone_are_no_bundle_s(models, tmp_path):
    _, several, _, tokens = models
    several.params.whole = None
    with pytest.raises(ValueError, match="rank 0 has a directory of its own share, but whole weights are needed"):
        write_golden(several, tokens, tmp_path / "bundle", weights=True)
    assert not (tmp_path / "bundle").exists()
    write_golden(several, tokens, tmp_path / "bundle")
    assert "logits" in read_trace(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_ranks_pass_the_conformance_suite(spread, name):
    """Grade whole models and caches over three ranks as any port is; an error of 1 % on one rank fails."""
    precision, changed = profile(name), []

    def spread_model(params: dict, constants: dict):
        config = Config.from_dict(constants)
        found, ranks = spread(params, config, min(3, config.n_heads))
        for rank in changed:
            ranks[rank].everyones = wrong(ranks[rank].everyones)
        return config, found

    def forward(params: dict, constants: dict, tokens: np.ndarray) -> np.ndarray:
        config, found = spread_model(params, constants)
        return precision.forward(found, config, tokens)

    def forward_passes(params: dict, constants: dict, passes: list, kept: list) -> np.ndarray:
        (config, found), logits = spread_model(params, constants), []
        cache = KVCache(config, np.shape(passes[0])[:-1])
        for tokens, keep in itertools.zip_longest(passes, kept):
            if keep is not None:
                cache.truncate(keep)
            logits.append(precision.forward(found, config, tokens, cache))
        return np.concatenate(logits, axis=-2)

    functions = {"forward": forward, "forward_passes": forward_passes}
    report = run_functions("ranks", functions, name, ("L3", "L4"))
    assert not report.failures, [(result.case.path, result.problem) for result in report.failures]
    assert {result.case.operation for result in report.results if result.passed} == functions.keys()
    assert all(result.passed for result in report.results if result.case.operation in functions)
    if name == "float32":
        changed.append(-1)
        report = run_functions("ranks", {"forward": forward}, name, ("L3",))
        assert not any(result.passed for result in report.results if result.case.operation == "forward")
