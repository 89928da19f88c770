"""Every metric against an independent calculation, and the units in the last place against the formats' own spacing."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from npllama.golden.compare.metrics import measure, ulp, unit_roundoff

import tiny


def pair(shape=(7, 31), off=1e-3):
    r = tiny.uniform(1, shape).astype(np.float64)
    return r + off * tiny.uniform(2, shape), r


def test_differences_are_those_of_plain_python():
    c, r = pair()
    m = measure(c, r, "float32")
    d = [abs(a - b) for a, b in zip(c.ravel().tolist(), r.ravel().tolist(), strict=True)]
    size = math.fsum(x * x for x in r.ravel().tolist())
    assert m.max_abs == max(d)
    assert m.max_rel == pytest.approx(max(x / abs(b) for x, b in zip(d, r.ravel().tolist(), strict=True)), rel=1e-12)
    assert m.rms == pytest.approx(math.sqrt(math.fsum(x * x for x in d) / len(d)), rel=1e-12)
    assert m.nmse == pytest.approx(math.fsum(x * x for x in d) / size, rel=1e-12)


@pytest.mark.torch
def test_cosine_is_torchs():
    import torch

    c, r = pair(off=0.5)
    expected = torch.nn.functional.cosine_similarity(torch.from_numpy(c).ravel(), torch.from_numpy(r).ravel(), dim=0)
    assert measure(c, r, "float32").cosine == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.torch
def test_logits_are_judged_as_torch_does():
    import torch

    c, r = pair((40, 50), off=0.7)
    m = measure(c, r, "float32", logits=True)
    log_c, log_r = (torch.log_softmax(torch.from_numpy(x), dim=-1) for x in (c, r))
    expected = torch.nn.functional.kl_div(log_c, log_r, reduction="batchmean", log_target=True)
    assert m.kl == pytest.approx(float(expected), rel=1e-10)
    best_c, best_r = (torch.topk(torch.from_numpy(x), 5, dim=-1).indices.tolist() for x in (c, r))
    assert m.top1 == pytest.approx(np.mean([a[0] == b[0] for a, b in zip(best_c, best_r, strict=True)]))
    assert m.top5 == pytest.approx(np.mean([len({*a} & {*b}) / 5 for a, b in zip(best_c, best_r, strict=True)]))
    assert 0 < m.top1 < 1, "a test in which nothing differs shows nothing"


@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
def test_ulp_is_the_formats_own_spacing(precision):
    dtype = np.dtype(ml_dtypes.bfloat16 if precision == "bfloat16" else precision)
    values = np.array([1.0, 1.5, 2.0, 3.99, 1e-3, 0.1, 60000.0, 2.0**-14, 2.0**-20, 0.0, -3.0], np.float64).astype(dtype)
    expected = np.abs(np.spacing(values)).astype(np.float64)
    np.testing.assert_array_equal(ulp(values.astype(np.float64), precision), expected)
    assert 2 * unit_roundoff(precision) == float(ml_dtypes.finfo(dtype).eps)


def test_distance_in_ulp_counts_neighbours():
    r = np.array([1.0, -300.0, 1e-3], np.float32)
    up = np.nextafter(r, np.float32(np.inf))
    m = measure(np.nextafter(up, np.float32(np.inf)), r, "float32")
    assert m.max_ulp == 2
    assert m.median_ulp == 2
    assert measure(up, r, "float32").max_ulp == 1
    one = np.ones(3, np.float32)
    m = measure(one + np.array([1, 1, 7], np.float32) * np.float32(2.0**-23), one, "float32")
    assert (m.median_ulp, m.max_ulp) == (1, 7)
    assert measure(up, r, "bfloat16").max_ulp == 2.0**-16, "the same distance is less of a coarser unit"


def test_equal_arrays_are_at_no_distance():
    x = np.array([[0.0, 1.0, -np.inf, 3.0]])
    m = measure(x, x, "float32")
    assert (m.max_abs, m.max_rel, m.rms, m.nmse, m.cosine, m.max_ulp) == (0, 0, 0, 0, 1, 0)


def test_zeros_have_a_meaning():
    zero, one = np.zeros(3), np.ones(3)
    assert measure(zero, zero, "float32").cosine == 1
    m = measure(one, zero, "float32")
    assert (m.max_rel, m.nmse, m.cosine) == (math.inf, math.inf, 0)


def test_what_is_not_finite_is_left_out():
    r, c = np.array([1.0, -np.inf, 2.0]), np.array([1.5, -np.inf, 2.0])
    m = measure(c, r, "float32")
    assert (m.max_abs, m.rms) == (0.5, math.sqrt(0.125))
