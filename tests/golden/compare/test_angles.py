"""Check that a RoPE's angles are found in its queries, and its constants in the angles."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from npllama import ops
from npllama.golden.compare import angles

import tiny

CONFIG = tiny.CONFIGS["llama3.1"]
POSITIONS = np.arange(5, 45)


def frequencies(config):
    return ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.float64)


@pytest.mark.parametrize("first", [0, 5, 4000])
def test_the_angles_are_found_from_any_first_position(first):
    positions = np.arange(first, first + 40)
    x = np.random.default_rng(1).standard_normal((40, 3, CONFIG.head_dim))
    after = ops.rope(x, *ops.rope_rotation(positions, frequencies(CONFIG)))
    np.testing.assert_allclose(angles.angles_between(x, after), frequencies(CONFIG), atol=1e-12)
    assert angles.angles_between(x[:1], after[:1]) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 1e6}, "wrong RoPE θ: the angles are those of θ = 1000000, and "),
        (
            {"rope_scaling": dataclasses.replace(CONFIG.rope_scaling, factor=3.0)},
            "wrong RoPE scale factor: 3, and 8 was expected",
        ),
        ({"rope_scaling": None, "rope_theta": 1e6}, "1000000, and .* was expected, without its scaling"),
    ],
)
def test_a_wrong_constant_is_among_those_said_and_gives_the_angles(changes, said):
    wrong = frequencies(dataclasses.replace(CONFIG, **changes))
    found = list(angles.wrong_frequencies(wrong, frequencies(CONFIG), CONFIG, POSITIONS))
    fitting = [text for text, made in found if angles.fits(made, wrong, POSITIONS)]
    assert any(re.search(said, text) for text in fitting), found


def test_angles_fit_up_to_rounding_at_the_furthest_position():
    right = frequencies(CONFIG)
    assert angles.fits(right, right, POSITIONS)
    assert angles.fits(right + 1e-6, right, np.array([100]))
    assert not angles.fits(right + 1e-6, right, np.array([10_000]))


def test_numbers_are_said_in_four_digits():
    assert [angles.rounded(x) for x in (500_000.04, 1e-5, 0.333333, 8.0)] == ["500000", "1e-05", "0.3333", "8"]
