"""Check that the converter resolves published params.json to the published shapes and parameter counts."""

from __future__ import annotations

import pytest

from npllama import n_parameters, parameter_shapes
from npllama_convert.meta import resolve
from npllama_convert.published import PUBLISHED


def config_of(name):
    model = PUBLISHED[name]
    return resolve(model.params, vocab_size=model.vocabulary, tied=model.tied, report=lambda line: None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert n_parameters(config_of(name)) == PUBLISHED[name].n_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_context_length_is_the_published_one(name):
    assert config_of(name).max_seq_len == PUBLISHED[name].max_seq_len


@pytest.mark.parametrize(
    ("name", "parameter", "shape"),
    [
        ("LLaMA 7B", "tok_embeddings.weight", (32000, 4096)),
        ("LLaMA 7B", "layers.31.attention.wk.weight", (4096, 4096)),
        ("LLaMA 7B", "layers.31.feed_forward.w1.weight", (11008, 4096)),
        ("LLaMA 13B", "layers.39.feed_forward.w2.weight", (5120, 13824)),
        ("LLaMA 30B", "layers.59.feed_forward.w1.weight", (17920, 6656)),
        ("LLaMA 65B", "layers.79.feed_forward.w3.weight", (22016, 8192)),
        ("Llama 2 70B", "layers.79.attention.wk.weight", (1024, 8192)),
        ("Llama 2 70B", "layers.79.feed_forward.w1.weight", (28672, 8192)),
        ("Code Llama 7B", "output.weight", (32016, 4096)),
        ("Code Llama 34B", "layers.47.feed_forward.w1.weight", (22016, 8192)),
        ("Llama 3 8B", "output.weight", (128256, 4096)),
        ("Llama 3 8B", "layers.31.attention.wv.weight", (1024, 4096)),
        ("Llama 3 8B", "layers.31.feed_forward.w2.weight", (4096, 14336)),
        ("Llama 3.1 405B", "layers.125.attention.wq.weight", (16384, 16384)),
        ("Llama 3.1 405B", "layers.125.feed_forward.w1.weight", (53248, 16384)),
        ("Llama 3.2 1B", "layers.15.attention.wk.weight", (512, 2048)),
        ("Llama 3.2 1B", "layers.15.feed_forward.w1.weight", (8192, 2048)),
        ("Llama 3.2 3B", "layers.27.attention.wq.weight", (3072, 3072)),
        ("Llama 3.2 3B", "layers.27.feed_forward.w1.weight", (8192, 3072)),
        ("TinyLlama 1.1B", "layers.21.attention.wk.weight", (256, 2048)),
        ("SmolLM2 135M", "layers.29.attention.wk.weight", (192, 576)),
        ("Mistral 7B v0.3", "layers.31.attention.wk.weight", (1024, 4096)),
    ],
)
def test_shapes(name, parameter, shape):
    assert parameter_shapes(config_of(name))[parameter] == shape


def test_one_billion_has_heads_of_64_and_no_output_matrix():
    config = config_of("Llama 3.2 1B")
    assert config.head_dim == 64
    assert "output.weight" not in parameter_shapes(config)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("Llama 3 8B", None),
        ("Llama 3.1 8B", 8),
        ("Llama 3.1 405B", 8),
        ("Llama 3.3 70B", 8),
        ("Llama 3.2 1B", 32),
        ("Llama 3.2 3B", 32),
    ],
)
def test_rope_scaling_is_the_families(name, factor):
    scaling = config_of(name).rope_scaling
    assert (scaling.factor if scaling else None) == factor
    if scaling:
        assert (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len) == (1, 4, 8192)


def test_what_the_files_leave_out_is_inferred_and_said():
    lines = []
    config = resolve(PUBLISHED["LLaMA 65B"].params, ffn_dim=22016, vocab_size=32000, report=lines.append)
    assert (config.rope_theta, config.n_kv_heads, config.vocab_size, config.max_seq_len) == (10000.0, 64, 32000, 2048)
    assert [line.split(":")[0] for line in lines] == ["n_kv_heads", "rope_theta", "vocab_size", "max_seq_len"]
    assert "LLaMA 1" in lines[-1]  # its eps is Llama 2's


def test_formula_of_llama3_agrees_with_the_dimension_said_outright():
    params = PUBLISHED["Llama 3 8B"].params
    outright = {key: value for key, value in params.items() if key not in ("multiple_of", "ffn_dim_multiplier")} | {
        "hidden_dim": 14336
    }
    silent = lambda line: None  # noqa: E731
    assert resolve(params, report=silent) == resolve(outright, report=silent)
