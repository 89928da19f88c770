"""Test kinds of checkpoints reported to other converters and runtimes: each is read, or its fault is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from npllama import Config, forward, generate, load
from npllama.chat import chat_format_of
from npllama.checkpoint import open_model

import foreign
import tiny
from conversions import assert_same, convert, refused
from vocabularies import metadata_of_json


@pytest.fixture(autouse=True)
def quick(quick_conversion) -> None:
    """Read in small blocks, and don't wait for the disk."""


def write(folder: Path, n_rows: int, tokenizer: Path, **changes: object) -> Path:
    """Write a Hugging Face folder with so many rows, this tokenizer and its companion files."""
    config = tiny.config(n_layers=1, vocab_size=n_rows)
    foreign.write_hf(folder, config, tiny.random_params(config, seed=5), **changes)
    shutil.copy(tokenizer, folder)
    return folder


# --------------------------------------------------------------------------------------------------- sizes of the vocabulary


def test_a_token_without_a_row_is_reported_and_refused_as_input(tmp_path, tiny_llama2_json_file):
    src = write(tmp_path / "src", 328, tiny_llama2_json_file)  # of 330
    lines = convert(src, tmp_path / "m")
    assert (
        "tokenizer.json has 330 tokens, the model 328 rows: ids from 328 on are never generated, and refused in a prompt"
        in lines
    )
    model = load(tmp_path / "m")
    ids = model.tokenizer.encode("Once upon a time", bos=True)
    assert all(id < 328 for id in generate(model, ids, max_tokens=20, temperature=2.0))
    with pytest.raises(ValueError, match=r"token id 329 is outside the vocabulary: expected 0 to 327$"):
        list(generate(model, [1, 329], max_tokens=1))


def test_a_row_without_a_token_may_be_sampled(tmp_path, tiny_llama2_json_file):
    src = write(tmp_path / "src", 394, tiny_llama2_json_file)
    assert "tokenizer.json has 330 tokens of the model's 394" in convert(src, tmp_path / "m")
    model = load(tmp_path / "m")
    ids = list(generate(model, [1, 5], max_tokens=40, temperature=3.0, seed=1))
    assert max(ids) >= 330
    assert model.tokenizer.decode(ids) == model.tokenizer.decode([id for id in ids if id < 330])
    with pytest.raises(ValueError, match="token id 394 is outside"):
        model.tokenizer.decode([394])


# ------------------------------------------------------------------------------------------------------- what ends an answer


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, 7, {2, 7}),
        (None, [7, 8], {2, 7, 8}),
        ({"temperature": 0.5}, 7, {2, 7}),
        ({"eos_token_id": 9}, 7, {2, 9}),
        (None, -1, {2}),
        (None, "7", {2}),
    ],
)
def test_config_json_says_what_ends_an_answer_where_nothing_else_does(
    tmp_path, tiny_llama2_json_file, generation, config, stops
):
    src = write(tmp_path / "src", 330, tiny_llama2_json_file, eos_token_id=config)
    if generation is not None:
        (src / "generation_config.json").write_text(json.dumps(generation))
    lines = convert(src, tmp_path / "m")
    model = open_model(tmp_path / "m")
    assert model.tokenizer.stop_ids == stops
    assert any(f"config.json: eos_token_id is {config!r}, expected 0 to 329: left out" in line for line in lines) == (
        stops == {2}
    )
    assert model.generation["temperature"] == (generation or {}).get("temperature")


# ------------------------------------------------------------------------------------------- a tokenizer.model and added tokens


def test_tokens_added_to_a_sentencepiece_model_come_along(tmp_path, tiny_sentencepiece_file):
    src = write(tmp_path / "src", 332, tiny_sentencepiece_file, eos_token_id=330)
    (src / "added_tokens.json").write_text('{"<|im_end|>": 330, "<|im_start|>": 331}')
    (src / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    (src / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    assert not any("tokens of the model's" in line for line in convert(src, tmp_path / "m"))
    tokenizer = open_model(tmp_path / "m").tokenizer
    assert tokenizer.encode("<|im_start|><|im_end|>", special=True) == [331, 330]
    assert tokenizer.stop_ids == {330}
    assert chat_format_of(tokenizer) == "chatml"


# -------------------------------------------------------------------------------------- windows, dynamic RoPE, biases, adapters


CONFIG = tiny.config(n_layers=1)
PARAMS = tiny.random_params(CONFIG, seed=5)


def write_kind(folder: Path, kind: str, window: object) -> Path:
    """Write CONFIG in a format, with a sliding window."""
    folder.mkdir()
    if kind == "gguf":
        return foreign.write_gguf(folder / "model.gguf", CONFIG, PARAMS, llama__attention__sliding_window=window)
    if kind == "meta":
        return write_consolidated(folder, CONFIG, PARAMS, sliding_window=window, max_seq_len=CONFIG.max_seq_len)
    return foreign.write_hf(folder, CONFIG, PARAMS, model_type="mistral", sliding_window=window)


def write_consolidated(folder: Path, config: Config, params: foreign.Params, **more: object) -> Path:
    """Test Mistral's form: consolidated.safetensors with Meta's names, and params.json."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(dict(params), folder / "consolidated.safetensors")
    names = {"dim": "dim", "n_layers": "n_layers", "head_dim": "head_dim", "hidden_dim": "ffn_dim", "n_heads": "n_heads"}
    names |= {"n_kv_heads": "n_kv_heads", "norm_eps": "norm_eps", "vocab_size": "vocab_size", "rope_theta": "rope_theta"}
    values = {theirs: getattr(config, ours) for theirs, ours in names.items()}
    (folder / "params.json").write_text(json.dumps(values | more))
    return folder


@pytest.mark.parametrize("kind", ["huggingface", "gguf", "meta"])
def test_a_window_ends_the_context_where_it_would_act(tmp_path, kind):
    n = CONFIG.max_seq_len
    for i, (window, context) in enumerate([(n + 1, n), (n, n), (n - 1, n - 1), (5, 5)]):
        lines = convert(write_kind(tmp_path / f"src{i}", kind, window), tmp_path / f"m{i}")
        assert open_model(tmp_path / f"m{i}").config == dataclasses.replace(CONFIG, max_seq_len=context)
        assert any("window" in line for line in lines)
        assert any(line.startswith(f"max_seq_len: {context} instead of {n} (cut to") for line in lines) == (context < n)
    refused(write_kind(tmp_path / "text", kind, "4096"), tmp_path / "m", "sliding_window is '4096', expected a positive whole")


@pytest.mark.torch
def test_a_window_computes_as_transformers_within_it(tmp_path):
    import torch

    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=131,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=12,
        initializer_range=0.3,
    )
    theirs = MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "m")
    model = load(tmp_path / "m")
    ids = [(7 * i + i * i) % 131 for i in range(13)]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(forward(model.params, model.config, ids[:12]), expected[:12], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="12"):
        forward(model.params, model.config, ids)


@pytest.mark.torch
@pytest.mark.parametrize("old", [False, True])
def test_dynamic_rope_is_unscaled_up_to_the_context(tmp_path, old):
    import torch

    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    changes = {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    if not old:
        changes = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": CONFIG.rope_theta}}
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS, old=old, **changes)
    lines = convert(src, tmp_path / "m")
    assert any(line.startswith("rope_scaling: none (dynamic") for line in lines)
    model = load(tmp_path / "m")
    assert model.config == CONFIG
    ids = [(7 * i + i * i) % 131 for i in range(CONFIG.max_seq_len)]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(src)(torch.tensor([ids])).logits[0].numpy()
    assert hf
    np.testing.assert_allclose(forward(model.params, model.config, ids), expected, rtol=0, atol=2e-5)


def with_biases(folder: Path, value: float, dtype: type = np.float32, **changes: object) -> Path:
    from safetensors.numpy import load_file, save_file

    src = foreign.write_hf(folder, CONFIG, PARAMS, **changes)
    biases = {f"model.layers.0.{name}.bias": np.zeros(96, dtype) for name in ("self_attn.q_proj", "mlp.down_proj")}
    biases["model.layers.0.mlp.down_proj.bias"][5] = value
    save_file(load_file(src / "model.safetensors") | biases, src / "model.safetensors")
    return src


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_biases_of_zero_are_left_out_with_a_line(tmp_path, dtype):
    src = with_biases(tmp_path / "src", -0.0, dtype, attention_bias=True, mlp_bias=True)
    assert "left out: 2 biases, all zero" in convert(src, tmp_path / "m")
    assert_same(tmp_path / "m", PARAMS)


def test_other_biases_are_refused_by_name(tmp_path):
    src = with_biases(tmp_path / "src", 1e-30, attention_bias=True)
    refused(src, tmp_path / "m", r"model\.safetensors: model\.layers\.0\.mlp\.down_proj\.bias: Llama has no biases")
    src = foreign.write_hf(tmp_path / "none", CONFIG, PARAMS, mlp_bias=True)
    refused(src, tmp_path / "m", "there are no biases, but config.json says mlp_bias: true$")
    path = tmp_path / "model.gguf"
    foreign.write_gguf(path, CONFIG, PARAMS, more={"blk.0.attn_q.bias": np.full(96, 2.0, np.float32)})
    refused(path, tmp_path / "m", r"blk\.0\.attn_q\.bias: Llama has no biases")


def test_an_adapter_next_to_whole_weights_is_no_fault(tmp_path):
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS)
    (src / "adapter_config.json").write_text("{}")
    convert(src, tmp_path / "m")
    assert_same(tmp_path / "m", PARAMS)
    (src / "model.safetensors").unlink()
    refused(src, tmp_path / "n", r"src holds an adapter \(LoRA\), expected whole weights")


@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_an_output_matrix_equal_in_value_is_tied(tmp_path, difference):
    from safetensors.numpy import load_file, save_file

    params = {name: to_float16(array) for name, array in PARAMS.items()}
    src = foreign.write_hf(tmp_path / "src", CONFIG, params, "float16")
    tensors = load_file(src / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(np.float32)
    tensors["lm_head.weight"][-1, -1] += difference
    save_file(tensors, src / "model.safetensors")
    lines = convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").config.tied_embeddings == (difference == 0)
    assert any("equals the embedding in value, as float32 and float16" in line for line in lines) == (difference == 0)


def to_float16(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


# --------------------------------------------------------------------------------------------------- other names for the files


def test_mistral_s_own_folder_is_read_without_torch(tmp_path, tiny_sentencepiece_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    config = tiny.config(n_layers=1, vocab_size=330, rope_theta=1e6, max_seq_len=32768)
    params = tiny.random_params(config, seed=5)
    src = write_consolidated(tmp_path / "src", config, params)
    shutil.copy(tiny_sentencepiece_file, src / "tokenizer.model.v3")
    lines = convert(src, tmp_path / "m")
    assert "max_seq_len: 32768 (inferred: Mistral 7B)" in lines
    assert_same(tmp_path / "m", params)
    model = open_model(tmp_path / "m")
    assert model.config == config
    assert model.tokenizer.vocab_size == 330
    convert(src / "consolidated.safetensors", tmp_path / "of-the-file")
    assert_same(tmp_path / "of-the-file", params)


def test_meta_s_tokenizer_may_stand_in_the_folder_above(tmp_path, tiny_sentencepiece_file):
    config = tiny.config(n_layers=1, vocab_size=330)
    (tmp_path / "above").mkdir()
    shutil.copy(tiny_sentencepiece_file, tmp_path / "above" / "tokenizer.model")
    src = write_consolidated(tmp_path / "above" / "src", config, tiny.random_params(config, seed=5), max_seq_len=64)
    assert "tokenizer.model: that of the folder above" in convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").tokenizer.vocab_size == 330


def save_torch(path: Path, tensors: foreign.Params, prefix: str = "") -> None:
    import torch

    torch.save({prefix + name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}, path)


@pytest.mark.torch
def test_torchtune_s_files_are_read(tmp_path):
    meta = write_consolidated(tmp_path / "meta", CONFIG, PARAMS, max_seq_len=CONFIG.max_seq_len)
    (meta / "consolidated.safetensors").unlink()
    save_torch(meta / "meta_model_3.pt", PARAMS)
    convert(meta, tmp_path / "a")
    convert(meta / "meta_model_3.pt", tmp_path / "b")
    src = foreign.write_hf(tmp_path / "hf", CONFIG, PARAMS)
    (src / "model.safetensors").unlink()
    tensors = foreign.hf_tensors(CONFIG, PARAMS)
    names = sorted(tensors)
    for i, part in enumerate((names[:5], names[5:]), start=1):
        save_torch(src / f"hf_model_{i:04}_3.pt", {name: tensors[name] for name in part})
    assert "no index: the weights are those of hf_model_0001_3.pt, hf_model_0002_3.pt" in convert(src, tmp_path / "c")
    for name in "abc":
        assert_same(tmp_path / name, PARAMS)
    save_torch(src / "hf_model_0001_2.pt", tensors)
    refused(src, tmp_path / "m", r"hf holds 2 models, which begin with hf_model_0001_2\.pt, hf_model_0001_3\.pt: expected one")
    save_torch(meta / "meta_model_2.pt", PARAMS)
    refused(meta, tmp_path / "m", r"holds meta_model_2\.pt and meta_model_3\.pt: expected one, or a file's name$")


@pytest.mark.torch
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_a_model_was_wrapped_in_is_taken_away(tmp_path, prefix):
    import torch

    meta = write_consolidated(tmp_path / "meta", CONFIG, PARAMS, max_seq_len=CONFIG.max_seq_len)
    (meta / "consolidated.safetensors").unlink()
    save_torch(meta / "consolidated.00.pth", PARAMS, prefix)
    convert(meta, tmp_path / "a")
    state = torch.load(meta / "consolidated.00.pth", weights_only=True)
    torch.save({"model": state, "epoch": 3}, meta / "consolidated.00.pth")
    convert(meta, tmp_path / "b")
    src = foreign.write_hf(tmp_path / "hf", CONFIG, PARAMS)
    (src / "model.safetensors").unlink()
    save_torch(src / "pytorch_model.bin", foreign.hf_tensors(CONFIG, PARAMS), prefix)
    convert(src, tmp_path / "c")
    for name in "abc":
        assert_same(tmp_path / name, PARAMS)
    torch.save({**state, **{name.removeprefix(prefix): tensor for name, tensor in state.items()}}, meta / "consolidated.00.pth")
    refused(meta, tmp_path / "m", r"names differ by the prefixes module\. and _orig_mod\. alone")


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS, n_shards=3)
    (src / "model.safetensors.index.json").unlink()
    assert any(line.startswith("no index: the weights are those of model-00001-of-") for line in convert(src, tmp_path / "m"))
    assert_same(tmp_path / "m", PARAMS)
    shutil.copy(src / "model-00001-of-00003.safetensors", src / "model-00002-of-00003.safetensors")
    refused(src, tmp_path / "n", r"model-00002-of-00003\.safetensors: .* is in another file already$")
    (src / "model-00002-of-00003.safetensors").unlink()
    refused(src, tmp_path / "n", r"shard 2 of 3 is missing, model-00001-of-00003\.safetensors is there$")


@pytest.mark.parametrize("tied", [False, True])
def test_version_1_of_llama2c(tmp_path, tied):
    config = tiny.config(n_layers=2, tied_embeddings=tied, rope_theta=10000.0, norm_eps=1e-5)
    params = tiny.random_params(config, seed=5)
    names = [f"layers.{i}.{name}.weight" for name in ("attention_norm", "ffn_norm") for i in range(2)]
    names += ["norm.weight", "tok_embeddings.weight"]
    matrices = [f"attention.w{x}" for x in "qkvo"] + [f"feed_forward.w{x}" for x in "123"]
    names += [f"layers.{i}.{name}.weight" for name in matrices for i in range(2)] + ["output.weight"] * (not tied)
    sizes = (config.dim, config.ffn_dim, 2, config.n_heads, config.n_kv_heads, config.vocab_size, config.max_seq_len)
    header = struct.pack("<4siiiiiiiiB", b"24ka", 1, *sizes, tied)
    data = header.ljust(256, b"\0") + b"".join(params[name].astype("<f4").tobytes() for name in names)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    convert(path, tmp_path / "m")
    assert open_model(tmp_path / "m").config == config
    assert_same(tmp_path / "m", params)
    for content, expected in (
        (data[:-4], "bytes, expected .*: cut off"),
        (data[:200], "no model has its constants: damaged"),
        (data[:4] + struct.pack("<i", 2) + data[8:], "format of version 2, expected 0 or 1"),
        (b"24ka", "format of version 0, expected 0 or 1"),
        (header[:8] + b"\xff" * 248, "no model has its constants"),
    ):
        path.write_bytes(content)
        refused(path, tmp_path / "n", expected)


# ------------------------------------------------------------------------------------------------------ another tokenizer, none


def test_another_tokenizer_or_none(tmp_path, tiny_llama2_json_file, tiny_sentencepiece_file, tiny_chatml_file):
    config = tiny.config(n_layers=1, vocab_size=330)
    params = tiny.random_params(config, seed=5)
    above = tmp_path / "other"
    above.mkdir()
    shutil.copy(tiny_llama2_json_file, above / "its.json")
    hf = write(tmp_path / "hf", 330, tiny_sentencepiece_file)
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    meta = write_consolidated(tmp_path / "meta", config, params, max_seq_len=64)
    (meta / "tokenizer.model").write_text("damaged")
    gguf = foreign.write_gguf(tmp_path / "x.gguf", config, params, tokenizer__ggml__model="llama")
    llama2c = foreign.write_llama2c(tmp_path / "x.bin", config, params)
    for i, src in enumerate((hf, meta, gguf, llama2c)):
        convert(src, tmp_path / f"other{i}", tokenizer=above / "its.json")
        tokenizer = open_model(tmp_path / f"other{i}").tokenizer
        assert type(tokenizer).__name__ == "HuggingFaceTokenizer"
        assert tokenizer.stop_ids == ({2, 9} if src == hf else {2})
        assert "no tokenizer: the model takes and gives token ids only" in convert(
            src, tmp_path / f"none{i}", no_tokenizer=True
        )
        assert open_model(tmp_path / f"none{i}").tokenizer is None
        refused(src, tmp_path / "m", "nowhere is missing$", tokenizer=tmp_path / "nowhere")
        refused(src, tmp_path / "m", "is it another model's", tokenizer=tiny_chatml_file)


# ------------------------------------------------------------------------------------------------------ recommendations


def test_what_can_t_be_followed_never_fails_a_conversion(tmp_path, tiny_llama2_json_file):
    src = write(tmp_path / "src", 330, tiny_llama2_json_file)
    values = {"temperature": "0.7", "top_p": 1.5, "eos_token_id": [-1, 330, 9], "bos_token_id": True}
    (src / "generation_config.json").write_text(json.dumps(values))
    lines = convert(src, tmp_path / "m")
    for said in ("temperature is '0.7'", "top_p is 1.5", "eos_token_id is -1", "eos_token_id is 330", "bos_token_id is True"):
        assert any(line.startswith(f"{src / 'generation_config.json'}: {said}") and line.endswith("left out") for line in lines)
    model = open_model(tmp_path / "m")
    assert (model.generation["temperature"], model.generation["top_p"]) == (None, None)
    assert model.tokenizer.stop_ids == {2, 9}
    assert list(generate(load(tmp_path / "m"), [1, 5], max_tokens=2))


def test_ids_of_a_gguf_vocabulary_that_it_has_not_are_left_out(tmp_path, tiny_chatml_file):
    metadata = metadata_of_json(tiny_chatml_file, "smollm", bos_token_id=10**6, eos_token_id=10**6)
    n = len(metadata["tokenizer.ggml.tokens"])
    config = tiny.config(n_layers=1, vocab_size=n)
    keys = {name.replace(".", "__"): value for name, value in metadata.items()}
    path = foreign.write_gguf(tmp_path / "x.gguf", config, tiny.random_params(config, seed=5), **keys)
    lines = convert(path, tmp_path / "m")
    for name in ("bos", "eos"):
        assert f"{path}: tokenizer.ggml.{name}_token_id is 1000000, expected 0 to {n - 1}: left out" in lines
    assert open_model(tmp_path / "m").tokenizer.vocab_size == n
