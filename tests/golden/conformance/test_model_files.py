"""Check the tiny models as files: the same bytes everywhere, and read by the libraries of their formats."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from npllama.checkpoint.foreign import read_json
from npllama.config import RopeScaling
from npllama.golden.conformance.arrays import safetensors
from npllama.golden.conformance.model_files import GGUF_NAMES, files_of, forms_of, model_at, path_of, rope_divisors, write
from npllama.golden.conformance.models import MODELS
from npllama.golden.conformance.suite import RECORDED
from npllama_convert import gguf, huggingface, meta

ALL = [(name, form) for name, model in MODELS.items() for form in forms_of(model)]


@pytest.mark.parametrize(("name", "form"), ALL)
def test_the_bytes_are_the_recorded_ones(name, form):
    held = read_json(RECORDED, ValueError)["models"]
    found = {path: hashlib.sha256(data).hexdigest() for path, data in files_of(MODELS[name], form).items()}
    assert found
    assert found == {path: held[path] for path in found}


@pytest.mark.parametrize(("name", "form"), [pair for pair in ALL if pair[1] != "pth"])
def test_our_loaders_find_the_model_in_them(name, form, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    check(name, {"gguf": gguf.read, "safetensors": huggingface.read}[form], write(MODELS[name], form, tmp_path))


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name, form in ALL if form == "pth"])
def test_metas_form_is_found_by_our_loader_and_by_torch(name, tmp_path):
    import torch

    path = write(MODELS[name], "pth", tmp_path)
    check(name, lambda path, report: meta.read(path, report=report), path)
    for mapped in (False, True):
        found = torch.load(path / "consolidated.00.pth", weights_only=True, mmap=mapped)
        assert found.keys() == MODELS[name].params.keys()
        for key, x in MODELS[name].params.items():
            assert found[key].dtype == torch.bfloat16
            assert np.array_equal(found[key].float().numpy(), x)


def check(name, read, path):
    source = read(path, lambda line: None)
    assert source.config == MODELS[name].config
    for key, x in MODELS[name].params.items():
        y = np.concatenate(list(source.tensors[key].blocks()))
        y = (y.astype(np.uint32) << 16).view(np.float32) if y.dtype == np.uint16 else y
        assert np.array_equal(x, y), key
    assert model_at(path_of(MODELS[name], "gguf")) is MODELS[name]


def test_gguf_is_read_by_the_package(tmp_path):
    library = pytest.importorskip("gguf", reason="gguf is not installed")
    model = MODELS["scaled_32"]
    reader = library.GGUFReader(write(model, "gguf", tmp_path))
    assert reader.fields["llama.attention.layer_norm_rms_epsilon"].contents() == model.config.norm_eps
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    key = f"blk.1.{GGUF_NAMES['attention.wq.weight']}"
    assert np.array_equal(tensors[key], model.params["layers.1.attention.wq.weight"])
    assert np.array_equal(tensors["rope_freqs.weight"], rope_divisors(model.config)["rope_freqs.weight"])


def test_safetensors_is_read_by_the_package():
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    x = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3)}
    found = library.load(safetensors(x))
    assert all(np.array_equal(found[name], x[name]) and found[name].dtype == x[name].dtype for name in x)


def test_constants_show_when_they_are_wrong():
    """Check for a large eps, an output matrix of its own, both scalings, and a tied one."""
    configs = [model.config for model in MODELS.values()]
    assert all(config.norm_eps > 0.1 for config in configs)
    assert [config.tied_embeddings for config in configs].count(True) == 1
    assert {config.rope_scaling.factor for config in configs if isinstance(config.rope_scaling, RopeScaling)} == {8, 32}
    for model in MODELS.values():
        assert len(np.unique(model.params["layers.0.attention.wq.weight"])) > 200
