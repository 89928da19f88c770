"""Our numbers against torch's, live: torch.nn.functional by operation, Hugging Face's LlamaForCausalLM end to end."""

from __future__ import annotations

import numpy as np
import pytest

import cases
from tiny import random_params, relative_error

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)

from npllama import forward, ops  # noqa: E402


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.OPS)
def test_operation(name, dtype, record_property):
    inputs = cases.op_inputs(dtype)[name]
    found, expected = cases.OPS[name](**inputs), hf.torch_op(name, inputs)
    assert found.dtype == expected.dtype == dtype
    error = relative_error(found, expected)
    record_property("relative_error", error)
    assert error <= cases.OP_BOUND[dtype]


@pytest.mark.parametrize("name", cases.ROPE_SHAPES)
def test_float32_frequencies_are_torch_s_to_one_unit_and_mostly_identical(name):
    expected = hf.torch_frequencies(cases.ROPE_SHAPES[name])
    found = ops.rope_frequencies(*cases.ROPE_SHAPES[name], "float32")
    assert np.abs(found.view(np.int32) - expected.view(np.int32)).max() <= 1
    assert np.mean(found == expected) >= 0.95


@pytest.mark.parametrize("name", cases.MODEL_CASES)
def test_model(name, record_property):
    case = cases.MODEL_CASES[name]
    config = case.config
    params = random_params(config, seed=7)  # other weights than the goldens'
    params64 = {key: x.astype(np.float64) for key, x in params.items()}
    ours = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, "float32") if case.long else None
    exact = hf.hf_logits(hf.hf_model(config, params64, "float64"), case.tokens)[..., -case.n_compared :, :]
    theirs = hf.hf_logits(hf.hf_model(config, params, frequencies=ours), case.tokens)[..., -case.n_compared :, :]
    if not case.long:  # far out, angles formed in float32 differ from exact ones by more than rounding: test_ops.py
        assert relative_error(theirs, exact) < cases.LOGITS_BOUND["float32"] / 3, "weights too wild to judge by"
    for dtype, parameters, expected in (("float32", params, theirs), ("float64", params64, exact)):
        error = relative_error(case.logits(parameters), expected)
        record_property(dtype, error)
        print(f"{name} {dtype}: {error:.1e}")
        assert error <= cases.LOGITS_BOUND[dtype]


def test_greedy_tokens_are_hugging_face_s():
    case = cases.MODEL_CASES["grouped"]
    params = random_params(case.config, seed=3)
    model = hf.hf_model(case.config, params)
    expected = hf.hf_greedy(model, case.tokens[:8], 40)
    ids = case.tokens[:8].tolist()
    for _ in range(40):
        ids.append(int(forward(params, case.config, ids, last_only=True)[0].argmax()))
    assert ids[8:] == expected
