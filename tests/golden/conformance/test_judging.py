"""Compare one array with the expected one: both norms, infinities, masks, and what any number is right for."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.golden.conformance.judging import Tolerance, difference, problem
from npllama.golden.conformance.operations import OPERATIONS, Program
from npllama.golden.mistakes import MISTAKES
from npllama.golden.precision import Precision

LOOSE, INF, NAN = Tolerance(0.5, 0.1), np.inf, np.nan


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        ([1.0, 2.4, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], "root-mean-square error 0.2, tolerance 0.1"),
        ([1.0, 2.6, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], "found 2.6 at [1], expected 2: off by 0.6, tolerance 0.5"),
        ([1.0, 2.1], [1.0, 2.0], None),
        ([NAN, 2.0], [1.0, 2.0], "found nan at [0], expected 1"),
        ([1.0, 7.0], [1.0, NAN], None),
        ([1.0, NAN], [1.0, NAN], None),
        ([1.0, 7.0], [1.0, -INF], "found 7 at [1], expected -inf"),
        ([1.0, INF], [1.0, -INF], "found inf at [1], expected -inf"),
        ([1.0, -1e9], [1.0, -INF], None),  # masks as -inf does
        ([1.0, -90.0], [1.0, -INF], "found -90 at [1], expected -inf"),
        ([1.0, -INF], [1.0, 2.0], "found -inf at [1], expected 2"),
        ([1.0], [1.0, 2.0], "its shape is [1], expected [2]"),
        ([[1.0, 2.0]], [1.0, 2.0], "its shape is [1, 2], expected [2]"),
    ],
)
def test_what_is_wrong(found, expected, words):
    assert problem(np.array(found), np.array(expected), LOOSE) == words


def test_relative_to_each_number():
    found, expected = np.array([1.0, 1.1e-3]), np.array([1.0, 1e-3])
    assert problem(found, expected, Tolerance(0.01, 0.01)) is None
    assert "relative error 0.1" in problem(found, expected, Tolerance(0.01, 0.01, relative=True))
    assert difference(found, expected, relative=True).at == (1,)


def test_an_exact_operation_has_no_tolerance():
    assert problem(np.array([1.0]), np.array([np.nextafter(1.0, 2.0)]), Tolerance(0, 0)) is not None


def test_a_program_with_a_mistake_computes_it():
    x = np.ones((1, 4), np.float32)
    arguments = {"x": x, "weight": np.full(4, 3, np.float32), "eps": 1e-5}
    for name, y in ((None, 3.0), ("no_norm_weight", 1.0), ("norm_weight_plus_one", 4.0)):
        program = Program(Precision("float32"), MISTAKES[name] if name else None)
        found = OPERATIONS["rms_norm"].run(program, arguments)["y"]
        assert np.allclose(found, y, atol=1e-4), name
