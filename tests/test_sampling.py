"""Drawing a token: each setting by its definition, the draw by its frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.sampling import LogitsError, Sampling, likeliest, log_probabilities, penalised, probabilities, sample

P = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(P) + 3


def test_greedy_is_the_first_of_the_most_likely():
    rng = np.random.default_rng(0)
    assert sample(np.array([1.0, 5.0, 5.0]), Sampling(), rng) == 1
    np.testing.assert_array_equal(probabilities(LOGITS, Sampling()), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    expected = P ** (1 / temperature)
    np.testing.assert_allclose(probabilities(LOGITS, Sampling(temperature)), expected / expected.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.4 - 1e-9}, [1]),
        ({"top_p": 0.4 + 1e-9}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 0.5}, [1, 3]),
        ({"min_p": 0.2}, [0, 1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # of the three left, 0.85 in all, the first two reach 0.82
    ],
    ids=str,
)
def test_filters_keep_what_their_definition_keeps(settings, kept):
    p = probabilities(LOGITS, Sampling(1.0, **settings))
    assert np.flatnonzero(p).tolist() == kept
    np.testing.assert_allclose(p[kept], P[kept] / P[kept].sum(), rtol=1e-12)


def test_top_p_that_is_reached_exactly_needs_no_more():
    assert probabilities(np.zeros(4), Sampling(1.0, top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]


def test_a_tiny_temperature_is_greedy():
    np.testing.assert_array_equal(probabilities(LOGITS.astype("float32"), Sampling(1e-308)), [0, 1, 0, 0, 0])


def test_draws_have_the_frequencies_of_the_distribution():
    rng = np.random.default_rng(1)
    n = 20_000
    counts = np.bincount([sample(LOGITS, Sampling(1.0), rng) for _ in range(n)], minlength=5)
    expected = n * P
    assert np.sum((counts - expected) ** 2 / expected) < 18.5  # chi-squared, 4 degrees of freedom: p = 0.001


class Lowest:
    """A random generator that returns the least number, 0.0."""

    @staticmethod
    def random() -> float:
        return 0.0


def test_a_draw_of_zero_takes_the_first_token_that_may_be_drawn():
    """Skip a token of probability zero in front: random() is at least 0.0 and below 1.0."""
    assert sample(np.array([-math.inf, -math.inf, 0.0, 1.0]), Sampling(1.0), Lowest()) == 2
    assert sample(np.array([1.0, 3.0, 2.0]), Sampling(1.0, top_k=2), Lowest()) == 1


@settings(deadline=None)
@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(0, 3),
    st.integers(0, 50),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1),
)
def test_any_setting_leaves_a_distribution_with_the_most_likely_in_it(logits, temperature, top_k, top_p, min_p):
    logits = np.array(logits, np.float32)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    p = probabilities(logits, sampling)
    assert np.isclose(p.sum(), 1)
    assert p[logits == logits.max()].max() == p.max()
    assert p[sample(logits, sampling, np.random.default_rng(0))] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)


def test_log_probabilities_of_any_size():
    assert log_probabilities(np.array([1e3, 0, -math.inf])).tolist() == [0, -1000, -math.inf]


def test_log_probabilities_of_each_row_by_itself():
    rows = np.log([[[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]], [[0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]])
    shifted = rows + np.array([[[1.0], [200.0]], [[-3.0], [0.0]]])
    np.testing.assert_allclose(log_probabilities(shifted), rows, rtol=1e-12)


@pytest.mark.torch
def test_log_probabilities_against_torch():
    import torch

    x = np.random.default_rng(2).normal(size=(3, 50)) * 20
    np.testing.assert_allclose(log_probabilities(x), torch.log_softmax(torch.from_numpy(x), -1).numpy(), rtol=1e-13, atol=1e-14)


@pytest.mark.torch
@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_filters_keep_what_hugging_face_s_keep(settings):
    import torch

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    ((name, value),) = settings.items()
    logits = np.random.default_rng(3).normal(size=(20, 64)).astype(np.float32) * 3
    warped = warpers[name](value)(None, torch.from_numpy(logits) / 0.7)
    expected = torch.softmax(warped.double(), -1).numpy()
    for row, p in zip(logits, expected, strict=True):
        np.testing.assert_allclose(probabilities(row, Sampling(0.7, **settings)), p, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([1, math.nan, 2], "of 3 logits 1 are NaN, expected numbers"),
        ([math.nan] * 3, "3 are NaN"),
        ([1, math.inf, -math.inf], "1 are inf, 1 are -inf"),
        ([-math.inf] * 3, "3 are -inf"),
        ([math.nan, math.inf, 0], "1 are NaN, 1 are inf"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_that_nothing_can_be_drawn_from(bad, words, temperature, dtype):
    with pytest.raises(LogitsError, match=words):
        sample(np.array(bad, dtype), Sampling(temperature), np.random.default_rng(0))
    with pytest.raises(LogitsError, match=words):
        probabilities(np.array(bad, dtype), Sampling(temperature))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_minus_infinity_rules_a_token_out(temperature):
    masked = np.array([-math.inf, 0, -math.inf, 0, -math.inf], np.float32)
    drawn = {sample(masked, Sampling(temperature), np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == ({1, 3} if temperature else {1})


def test_a_repetition_penalty_by_its_definition():
    """Follow Keskar et al. 2019 (arXiv:1909.05858), as in Hugging Face: negative logits are multiplied, once for each id."""
    logits = np.array([3.0, -2.0, 1.0, 0.0], np.float32)
    assert penalised(logits, [0, 1, 0], 2.0).tolist() == [1.5, -4.0, 1.0, 0.0]
    assert penalised(logits, [0], 1.0) is logits
    assert penalised(logits, [], 2.0) is logits
    assert logits.tolist() == [3.0, -2.0, 1.0, 0.0]


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_against_transformers(penalty):
    import torch

    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rng = np.random.default_rng(0)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(20):
        logits = rng.normal(size=30, scale=4).astype(np.float32)
        before = rng.integers(0, 30, rng.integers(1, 40))
        expected = processor(torch.from_numpy(before)[None], torch.from_numpy(logits.copy())[None])[0].numpy()
        found = penalised(logits, before, penalty)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
        assert sample(logits, Sampling(repetition_penalty=penalty), rng, before) == expected.argmax()


@pytest.mark.parametrize("k", [0, 1, 2, 5, 19, 20, 50])
def test_the_likeliest_are_those_of_a_stable_sort(k):
    """Keep the order of the ids in ties, which are frequent in 16-bit logits."""
    rng = np.random.default_rng(4)
    for values in (rng.standard_normal(20), rng.integers(0, 4, 20).astype(float), np.full(20, -np.inf), np.zeros(20)):
        assert likeliest(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()
