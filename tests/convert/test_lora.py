"""Test merged PEFT adapters: the logits equal those of PEFT's own merged model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from npllama import forward, load
from npllama.checkpoint import open_model

import foreign
import tiny
from conversions import convert, refused

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's of transformers
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
CONFIG = tiny.config(n_layers=2, n_heads=6, n_kv_heads=2)
PARAMS = tiny.random_params(CONFIG, seed=5)
IDS = [(7 * i + i * i) % 131 for i in range(30)]
SETTINGS = {
    "two matrices": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all matrices, rsLoRA": {"target_modules": "all-linear", "r": 4, "lora_alpha": 3, "use_rslora": True},
    "whole modules": {"target_modules": ["k_proj", "down_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "embedding and output": {"target_modules": ["embed_tokens", "lm_head"], "r": 3},
}


@pytest.fixture(autouse=True)
def quick(quick_conversion) -> None:
    """Read in small blocks, and don't wait for the disk."""


def adapter(folder: Path, base: Path, **settings: object):
    """Save an untrained adapter with random numbers, and make PEFT's merged model."""
    import torch

    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def base(tmp_path) -> Path:
    return foreign.write_hf(tmp_path / "base", CONFIG, PARAMS)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_logits_are_those_of_peft_s_merged_model(tmp_path, base, name):
    import torch

    model = adapter(tmp_path / "adapter", base, **SETTINGS[name])
    lines = convert(base, tmp_path / "m", lora=tmp_path / "adapter")
    assert any("matrices merged, rank" in line for line in lines)
    with torch.no_grad():
        expected = model.merge_and_unload()(torch.tensor([IDS])).logits[0].numpy()
    ours = load(tmp_path / "m")
    np.testing.assert_allclose(forward(ours.params, ours.config, IDS), expected, rtol=0, atol=5e-5)
    plain = forward(PARAMS, CONFIG, IDS)
    assert np.abs(expected - plain).max() > 0.05
    assert {"adapter_config.json", "adapter_model.safetensors"} <= ours.manifest["source"]["files"].keys()


def test_it_is_rounded_once(tmp_path):
    base = foreign.write_hf(tmp_path / "base", CONFIG, PARAMS, "float16")
    model = adapter(tmp_path / "adapter", base, target_modules=["v_proj"], r=4)
    convert(base, tmp_path / "m", lora=tmp_path / "adapter")
    found = open_model(tmp_path / "m").params["layers.1.attention.wv.weight"]
    merged = model.merge_and_unload().model.layers[1].self_attn.v_proj.weight.detach().numpy()
    assert found.dtype == np.float16
    assert np.mean(found == merged.astype(np.float16)) > 0.999  # float32 sums in another order may round otherwise
    np.testing.assert_allclose(found.astype(np.float32), merged, rtol=2**-11, atol=1e-6)


def test_a_base_of_another_kind(tmp_path, base):
    adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"], r=4)
    gguf = foreign.write_gguf(tmp_path / "base.gguf", CONFIG, PARAMS)
    for i, src in enumerate((base, gguf)):
        convert(src, tmp_path / f"m{i}", lora=tmp_path / "adapter")
    one, other = (open_model(tmp_path / f"m{i}").params for i in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_tied_embeddings(tmp_path):
    import torch

    config = tiny.config(n_layers=1, tied_embeddings=True)
    base = foreign.write_hf(tmp_path / "base", config, tiny.random_params(config, seed=5))
    model = adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    convert(base, tmp_path / "m", lora=tmp_path / "adapter")
    ours = load(tmp_path / "m")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(forward(ours.params, ours.config, IDS), expected, rtol=0, atol=5e-5)
    assert not ours.config.tied_embeddings
    adapter(tmp_path / "both", base, target_modules=["embed_tokens"])
    refused(
        base,
        tmp_path / "n",
        "tok_embeddings.weight is adapted, but it is the embedding and the output matrix",
        lora=tmp_path / "both",
    )
    adapter(tmp_path / "neither", base, target_modules=["q_proj"])
    convert(base, tmp_path / "o", lora=tmp_path / "neither")
    assert open_model(tmp_path / "o").config.tied_embeddings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_dora": True}, "use_dora is True, which is not merged"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'$"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is .*, which is not merged"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is .*, which is not merged"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, which is not merged"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is .*, which is not merged"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is .*, which is not merged"),
        ({"something_new": 1}, "something_new is 1, which is not merged"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's weights too$"),
        ({"r": 0}, "r is 0, expected a positive whole number$"),
        ({"r": 5}, r"A is \[4, 96\] and B \[96, 4\], expected \[5, 96\] and \[96, 5\]$"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a positive number$"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false$"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, base, changes, expected):
    write_adapter(tmp_path / "adapter", changes)
    refused(base, tmp_path / "m", expected, lora=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (96,), "lora_magnitude_vector' is unexpected"),
        ("model.layers.0.self_attn.q_proj.bias", (96,), "bias' is unexpected"),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", (4, 96), r"layers\.7\.attention\.wq\.weight is not a parameter"),
        ("model.layers.0.self_attn.v_proj.lora_A.weight", (4, 96), r"wv\.weight has A alone, expected A and B$"),
        ("lm_head.weight", (140, 96), r"output\.weight is \[140, 96\], expected \[131, 96\]$"),
    ],
)
def test_tensors_that_are_not_lora_s_are_refused_by_name(tmp_path, base, name, shape, expected):
    write_adapter(tmp_path / "adapter", {}, {f"base_model.model.{name}": np.ones(shape, np.float32)})
    refused(base, tmp_path / "m", expected, lora=tmp_path / "adapter")


def write_adapter(folder: Path, changes: dict[str, object], more: dict[str, np.ndarray] | None = None) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{name}A.weight": np.ones((4, 96), np.float32), f"{name}B.weight": np.ones((96, 4), np.float32)}
    save_file(pair | (more or {}), folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
