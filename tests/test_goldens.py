"""Our numbers against torch's, recorded by make_goldens.py: runs everywhere, torch or not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from npllama import forward, ops

import cases
from cases import golden
from tiny import random_params, relative_error, sha256_of


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.OPS)
def test_operation(name, dtype):
    prefix = f"{dtype}/{name}/"
    inputs = {key.removeprefix(prefix): x for key, x in golden("ops").items() if key.startswith(prefix)}
    expected = inputs.pop("output")
    found = cases.OPS[name](**inputs)
    assert found.dtype == expected.dtype == dtype
    assert relative_error(found, expected) <= cases.OP_BOUND[dtype]


@pytest.mark.parametrize("name", cases.ROPE_SHAPES)
def test_float32_frequencies_are_torch_s_to_one_unit_and_mostly_identical(name):
    expected = golden("frequencies")[name]
    found = ops.rope_frequencies(*cases.ROPE_SHAPES[name], "float32")
    assert np.abs(found.view(np.int32) - expected.view(np.int32)).max() <= 1
    assert np.mean(found == expected) >= 0.95


def test_rounding_exact_frequencies_would_not_be_torch_s():
    """Show why rope_frequencies computes in float32 step by step."""
    expected = golden("frequencies")["llama3"]
    rounded = ops.rope_frequencies(*cases.ROPE_SHAPES["llama3"], "float64").astype(np.float32)
    assert np.mean(rounded == expected) < 0.75


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.MODEL_CASES)
def test_model(name, dtype):
    case, recorded = cases.MODEL_CASES[name], golden(f"model-{name}")
    facts = json.loads(str(recorded["about"]))
    params = random_params(case.config, facts["params_seed"])
    assert sha256_of(params) == facts["params_sha256"], "the random weights are not those the golden was made with"
    np.testing.assert_array_equal(case.tokens, recorded["tokens"])
    params = {key: x.astype(dtype) for key, x in params.items()}
    logits = case.logits(params)
    assert logits.dtype == dtype
    assert relative_error(logits, recorded[f"{dtype}/logits"]) <= cases.LOGITS_BOUND[dtype]

    outputs = {key.removeprefix(f"{dtype}/"): x for key, x in recorded.items() if key.startswith(f"{dtype}/layers.")}
    seen: dict[str, np.ndarray] = {}
    if outputs:
        forward(params, case.config, case.tokens, tap=lambda name, x: seen.setdefault(name, x))
    for key, expected in outputs.items():
        assert relative_error(seen[key], expected) <= cases.LOGITS_BOUND[dtype], key
