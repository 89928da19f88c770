"""Check that activations captured from torch models equal npllama's of the same name."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tiny

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from npllama import LinearRopeScaling  # noqa: E402
from npllama.cli import main  # noqa: E402
from npllama.golden.precision import round_bfloat16  # noqa: E402
from npllama.golden.trace import Selection, TraceError, record  # noqa: E402
from npllama_convert.capture import capture  # noqa: E402

from hf_reference import hf_model  # noqa: E402
from meta_reference import meta_model  # noqa: E402

REAL = pytest.param(
    True, id="real", marks=pytest.mark.skipif("NPLLAMA_META_MODEL" not in os.environ, reason="NPLLAMA_META_MODEL is not set")
)
OURS_OR_REAL = [pytest.param(False, id="ours"), REAL]


def numpy_model(config, seed=1):
    return SimpleNamespace(config=config, params=tiny.random_params(config, seed))


def assert_same_activations(captured, recorded, tolerance):
    assert list(captured) == list(recorded)
    for name, x in recorded.items():
        finite = np.isfinite(x)
        np.testing.assert_array_equal(np.isfinite(captured[name]), finite, err_msg=name)
        assert tiny.relative_error(captured[name][finite], x[finite]) < tolerance, name


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_hugging_face_model_gives_the_activations_of_the_same_name(tmp_path, name):
    model = numpy_model(tiny.CONFIGS[name])
    tokens = tiny.random_tokens(model.config, 2, 9)
    captured = capture(hf_model(model.config, model.params), tokens, tmp_path / "t")
    assert_same_activations(captured, record(model, tokens), 5e-6)
    assert captured.meta["source"] == "transformers"
    assert captured.meta["model"]["config"] == model.config.to_dict()
    assert captured.meta["versions"]["torch"] == torch.__version__
    assert any("adjacent pairs" in note for note in captured.meta["notes"])


def test_a_model_with_linear_scaling_is_captured_as_it_is_converted(tmp_path):
    model = numpy_model(tiny.config(rope_scaling=LinearRopeScaling(4.0)))
    captured = capture(hf_model(model.config, model.params), tokens := tiny.random_tokens(model.config, 2, 9), tmp_path / "t")
    assert_same_activations(captured, record(model, tokens), 5e-6)
    assert captured.meta["model"]["config"] == model.config.to_dict()


@pytest.mark.parametrize("real", OURS_OR_REAL)
def test_metas_transformer_gives_the_activations_of_the_same_name(tmp_path, real):
    model = numpy_model(tiny.config())
    tokens = tiny.random_tokens(model.config, 2, 9)
    captured = capture(meta_model(model.config, model.params, real=real), tokens, tmp_path / "t", steps=2)
    assert_same_activations(captured, record(model, tokens, steps=captured.meta["steps"]), 5e-6)
    assert captured.meta["source"] == "llama-models"
    assert captured.meta["model"]["config"] == model.config.to_dict()


@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=str)
def test_decode_steps_go_through_torchs_own_cache(tmp_path, shape):
    model = numpy_model(tiny.CONFIGS["grouped"])
    tokens = tiny.random_tokens(model.config, 2, shape)
    captured = capture(hf_model(model.config, model.params), tokens, tmp_path / "t", steps=2)
    assert_same_activations(captured, record(model, tokens, steps=2), 1e-5)
    given = capture(hf_model(model.config, model.params), tokens, tmp_path / "given", steps=captured.meta["steps"])
    assert given.meta["activations"] == captured.meta["activations"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_another_dtype_is_run_in_a_copy_whose_rope_frequencies_stay(tmp_path, dtype):
    model = numpy_model(tiny.CONFIGS["grouped"])
    judge = hf_model(model.config, model.params)
    before = {name: x.clone() for name, x in judge.state_dict().items()}
    captured = capture(judge, [3, 1, 2], tmp_path / "t", dtype=dtype)
    assert captured.meta["precision"] == dtype
    assert captured.meta["convention"] == (None if dtype == "float64" else "hf")
    assert captured["logits"].dtype == ("float64" if dtype == "float64" else "float32")
    assert not any("frequencies are rounded" in note for note in captured.meta["notes"])
    if dtype == "bfloat16":
        for name, x in captured.items():
            np.testing.assert_array_equal(round_bfloat16(x), x, err_msg=name)
    else:
        assert_same_activations(captured, record(model, [3, 1, 2]), 1e-2)
    assert all(torch.equal(x, before[name]) for name, x in judge.state_dict().items())
    assert judge.model.rotary_emb.inv_freq.dtype == torch.float32


def test_frequencies_that_the_caller_rounded_are_reported(tmp_path):
    model = numpy_model(tiny.CONFIGS["grouped"])
    captured = capture(hf_model(model.config, model.params).bfloat16(), [3, 1, 2], tmp_path / "t")
    assert any("RoPE frequencies are rounded to torch.bfloat16" in note for note in captured.meta["notes"])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_saved_model_is_captured_from_its_folder(tmp_path, dtype):
    model = numpy_model(tiny.CONFIGS["llama3.2"])
    judge = hf_model(model.config, model.params)
    judge.save_pretrained(tmp_path / "hf")
    captured = capture(tmp_path / "hf", [3, 1, 2], tmp_path / "t", dtype=dtype, selection=Selection(taps=("logits",)))
    expected = capture(judge, [3, 1, 2], tmp_path / "e", dtype=dtype, selection=Selection(taps=("logits",)))
    assert captured.meta["activations"] == expected.meta["activations"]
    assert captured.meta["model"]["path"] == str(tmp_path / "hf")


def test_the_model_is_left_as_it_was(tmp_path):
    from transformers.models.llama import modeling_llama

    model = numpy_model(tiny.CONFIGS["grouped"])
    judge = hf_model(model.config, model.params).train()
    rotary, softmax = modeling_llama.apply_rotary_pos_emb, torch.nn.functional.softmax

    def as_it_was():
        assert judge.training
        assert judge.config._attn_implementation == "sdpa"
        assert modeling_llama.apply_rotary_pos_emb is rotary
        assert torch.nn.functional.softmax is softmax
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in judge.modules())

    capture(judge, [3, 1], tmp_path / "t")
    as_it_was()
    judge.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(judge, [3, 1], tmp_path / "broken")
    judge.lm_head._forward_hooks.clear()
    as_it_was()
    assert not (tmp_path / "broken").exists()


def test_a_missing_mask_is_not_papered_over(tmp_path, monkeypatch):
    """Check that only scores that the model itself masked become -inf."""
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)
    model = numpy_model(tiny.CONFIGS["grouped"])
    captured = capture(hf_model(model.config, model.params), [3, 1, 2], tmp_path / "t")
    assert np.isfinite(captured["layers.0.attention.scores"]).all()


def test_what_cannot_be_captured_is_refused(tmp_path):
    model = numpy_model(tiny.CONFIGS["grouped"])
    judge = hf_model(model.config, model.params)
    for tokens, message in [([131], "outside the vocabulary"), ([1, -1], "padding can't be captured"), ([], "at least one")]:
        with pytest.raises(ValueError, match=message):
            capture(judge, tokens, tmp_path / "t")
    with pytest.raises(TraceError, match="expected a folder of Hugging Face's format"):
        capture(tmp_path, [1], tmp_path / "t")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TraceError, match="no file named"):
        capture(tmp_path, [1], tmp_path / "t")
    with pytest.raises(ValueError, match="precision is 'int8'"):
        capture(judge, [1], tmp_path / "t", dtype="int8")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(TraceError, match="GPT2LMHeadModel has neither the structure of"):
        capture(gpt2, [1], tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["capture", str(tmp_path), "--tokens", "1", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == f"npllama capture: capturing needs {package}: pip install 'npllama[torch]'\n"
