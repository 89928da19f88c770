"""Test Hugging Face's folders: transformers' files convert bit for bit, and anything but a Llama is refused by its name."""

from __future__ import annotations

import json
import os
import shutil
import struct

import numpy as np
import pytest

from npllama import LinearRopeScaling, forward, load, ops
from npllama.checkpoint import open_model, verify
from npllama.checkpoint.foreign import read_safetensors
from npllama.engine.linear import to_bfloat16
from npllama_convert import huggingface

import tiny
from conversions import assert_same, convert, refused
from tiny import relative_error

pytest.importorskip("safetensors", reason="safetensors is not installed")
foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)

CONFIG = tiny.config(n_layers=1)
CONFIGS = tiny.CONFIGS | {"linear": tiny.config(rope_scaling=LinearRopeScaling(4.0), n_layers=1)}


@pytest.fixture(autouse=True)
def small_blocks(quick_conversion):
    """Read in blocks of a few rows, which end anywhere within a head."""


# --------------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("old", [False, True], ids=["new rope", "old rope"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_comes_back_bit_for_bit(tmp_path, name, old):
    config = CONFIGS[name]
    params = tiny.random_params(config, seed=5)
    convert(foreign.write_hf(tmp_path / "src", config, params, old=old), tmp_path / "m")
    assert_same(tmp_path / "m", params)
    assert open_model(tmp_path / "m").config == config
    assert verify(tmp_path / "m") == []


@pytest.mark.parametrize("old", [False, True])
def test_the_context_before_scaling_may_be_next_to_the_scaling(tmp_path, old):
    config = tiny.CONFIGS["llama3.1"]
    section = "rope_scaling" if old else "rope_parameters"
    rope = foreign.hf_config(config, old)[section]
    more = {"original_max_position_embeddings": rope.pop("original_max_position_embeddings"), section: rope}
    src = foreign.write_hf(tmp_path / "src", config, tiny.random_params(config, seed=5), old=old, **more)
    convert(src, tmp_path / "m")
    assert open_model(tmp_path / "m").config == config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_16_bits_stay_what_they_are_in_one_file_or_several(tmp_path, dtype, n_shards):
    params = tiny.random_params(CONFIG, seed=5)
    convert(foreign.write_hf(tmp_path / "src", CONFIG, params, dtype, n_shards), tmp_path / "m")
    if dtype == "bfloat16":
        expected = {name: to_bfloat16(array) for name, array in params.items()}
    else:
        expected = {name: array.astype(np.float16) for name, array in params.items()}
    assert_same(tmp_path / "m", expected)
    files = open_model(tmp_path / "m").manifest["source"]["files"]
    assert len(files) == (2 if n_shards == 1 else 5)


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_converts_and_computes_the_same(tmp_path, name):
    import torch

    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    config = CONFIGS[name]
    params = tiny.random_params(config, seed=6)
    hf.hf_model(config, params).save_pretrained(tmp_path / "src", max_shard_size="200KB")
    assert (tmp_path / "src" / "model.safetensors.index.json").exists()
    convert(tmp_path / "src", tmp_path / "m")
    assert_same(tmp_path / "m", params)
    model = load(tmp_path / "m")
    assert model.config == config
    judge = hf.LlamaForCausalLM.from_pretrained(tmp_path / "src", dtype=torch.float32).eval()
    tokens = tiny.random_tokens(config, 1, 20)
    assert relative_error(forward(model.params, model.config, tokens), hf.hf_logits(judge, tokens)) < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch_model_bin(tmp_path, n_shards, dtype):
    import torch

    params = tiny.random_params(CONFIG, seed=5)
    src = foreign.write_hf(tmp_path / "src", CONFIG, params)
    (src / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(x).to(getattr(torch, dtype)) for name, x in foreign.hf_tensors(CONFIG, params).items()}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if n_shards == 1:
        torch.save(tensors, src / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({name: x for name, x in tensors.items() if weight_map[name] == file}, src / file)
        (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    lines = convert(src, tmp_path / "m")
    if dtype == "bfloat16":
        params = {name: to_bfloat16(array) for name, array in params.items()}
    assert_same(tmp_path / "m", params)
    assert "left out, not parameters: model.layers.N.self_attn.rotary_emb.inv_freq" in lines


def test_our_reader_of_safetensors_is_the_library_s(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1, 5), np.float16), "c": np.ones(3)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"a": "b"})
    found, expected = read_safetensors(tmp_path / "x.safetensors", ValueError), load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_interleaving_by_hand():
    # Two heads of four rows: of each, rows 0 1 are the real parts and 2 3 the imaginary ones.
    assert huggingface.interleaved_order(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.torch
@pytest.mark.parametrize("factor", [2.0, 8.0, 2.5])
def test_linear_frequencies_are_transformers_to_the_bit(factor):
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    shape = (64, 10000.0, LinearRopeScaling(factor))
    expected, found = hf.torch_frequencies(shape), ops.rope_frequencies(*shape, "float32")
    assert found.dtype == np.float32
    assert np.abs(found.view(np.int32) - expected.view(np.int32)).max() <= 1


# ------------------------------------------------------------------------------------------------------- tied or not, settings


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("how", ["absent", "equal", "different"])
def test_tied_embeddings(tmp_path, how, said):
    config = tiny.config(n_layers=1, tied_embeddings=how == "absent")
    params = tiny.random_params(config, seed=5)
    if how == "equal":
        params["output.weight"] = params["tok_embeddings.weight"].copy()
    src = foreign.write_hf(tmp_path / "src", config, params, tie_word_embeddings=said)
    if said is True and how == "different":
        refused(src, tmp_path / "m", r"lm_head\.weight differs from the embedding, but config\.json says they are tied$")
    elif said is False and how == "absent":
        refused(src, tmp_path / "m", r"lm_head\.weight is missing, but config\.json says tie_word_embeddings: false$")
    else:
        lines = convert(src, tmp_path / "m")
        model = open_model(tmp_path / "m")
        assert model.config.tied_embeddings == ("output.weight" not in model.params) == (how != "different")
        assert any(line.startswith("tied embeddings") for line in lines) == (how != "different")


def test_what_is_left_out_is_inferred_as_transformers_does(tmp_path):
    config = tiny.config(n_layers=1, n_kv_heads=6, max_seq_len=2048)
    params = tiny.random_params(config, seed=5)
    gone = dict.fromkeys(("num_key_value_heads", "head_dim", "rope_parameters", "max_position_embeddings"))
    lines = convert(foreign.write_hf(tmp_path / "src", config, params, **gone), tmp_path / "m")
    assert open_model(tmp_path / "m").config == config
    assert lines[:3] == [
        "n_kv_heads: 6 (inferred: as n_heads)",
        "rope_theta: 10000 (inferred: transformers' default)",
        "max_seq_len: 2048 (inferred: transformers' default)",
    ]


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"


@pytest.mark.parametrize("where", ["string", "list", "file", "chat_template.json"])
def test_the_chat_template_is_stored(tmp_path, where, tiny_sentencepiece_file):
    config = tiny.config(n_layers=1, vocab_size=340)
    src = foreign.write_hf(tmp_path / "src", config, tiny.random_params(config, seed=5))
    shutil.copy(tiny_sentencepiece_file, src / "tokenizer.model")
    several = [
        {"name": "tool_use", "template": "other"},
        {"name": "default", "template": PLAIN},
        {"name": "../x", "template": "y"},
    ]
    values = {"add_bos_token": True, "chat_template": {"string": PLAIN, "list": several, "file": "of no use"}.get(where)}
    (src / "tokenizer_config.json").write_text(json.dumps(values))
    if where == "file":
        (src / "chat_template.jinja").write_text(PLAIN)
        (src / "additional_chat_templates").mkdir()
        (src / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    elif where == "chat_template.json":
        (src / where).write_text(json.dumps({"chat_template": PLAIN}))
    (src / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}')
    lines = convert(src, tmp_path / "m")
    model = open_model(tmp_path / "m")
    assert model.generation == {"chat_format": None, "system": None, "temperature": 0.6, "top_p": 0.9}
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == tiny_sentencepiece_file.read_bytes()
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == PLAIN
    assert model.tokenizer.vocab_size == 330
    named = where in ("list", "file")
    assert (tmp_path / "m" / "chat_template.tool_use.jinja").exists() == named
    assert any(line.startswith(f"chat template: the model's own{', and tool_use' * named};") for line in lines)
    assert ("chat template '../x' is left out: expected a name of letters, digits, _ and -" in lines) == (where == "list")
    assert verify(tmp_path / "m") == []
    (tmp_path / "m" / "chat_template.jinja").write_text(PLAIN + " ")
    assert "chat_template.jinja" in verify(tmp_path / "m")[0]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8, expected a chat template: left out"),
        ("chat_template.jinja", b" \n", "chat template default is left out: it is empty"),
        (
            "tokenizer_config.json",
            b'{"chat_template": 3}',
            "chat_template is 3, expected a text or a list of name and template: left out",
        ),
        ("tokenizer_config.json", b"{}", "chat template: none; npllama chat asks for --format"),
        (
            "tokenizer_config.json",
            b'{"chat_template": [{"name": "rag", "template": "a"}]}',
            "chat template: none of its own, but rag; npllama chat asks for --format",
        ),
    ],
)
def test_without_a_template_there_is_no_chat_format(tmp_path, name, content, line, tiny_sentencepiece_file):
    config = tiny.config(n_layers=1, vocab_size=340)
    src = foreign.write_hf(tmp_path / "src", config, tiny.random_params(config, seed=5))
    shutil.copy(tiny_sentencepiece_file, src / "tokenizer.model")
    (src / name).write_bytes(content)
    lines = convert(src, tmp_path / "m")
    assert any(found.endswith(line) for found in lines), lines
    assert open_model(tmp_path / "m").generation["chat_format"] is None
    assert not (tmp_path / "m" / "chat_template.jinja").exists()


def test_tokenizer_json_comes_before_tokenizer_model_and_unchanged(tmp_path, tiny_sentencepiece_file):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(src / "tokenizer.json"))
    shutil.copy(tiny_sentencepiece_file, src / "tokenizer.model")
    lines = convert(src, tmp_path / "m")
    assert "tokenizer.json has 5 tokens of the model's 131" in lines
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    assert not (tmp_path / "m" / "tokenizer.model").exists()
    assert open_model(tmp_path / "m").tokenizer.encode("abba") == [2, 1, 0]
    assert "chat template: none; npllama chat asks for --format" in lines
    assert open_model(tmp_path / "m").generation["chat_format"] is None


def test_a_tokenizer_twice_as_large_as_the_vocabulary_is_refused(tmp_path, tiny_sentencepiece_file):
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5))
    shutil.copy(tiny_sentencepiece_file, src / "tokenizer.model")
    refused(src, tmp_path / "m", r"tokenizer\.model has 330 tokens, but the model's vocabulary 131: is it another")


# ---------------------------------------------------------------------------------------------------------------- each its line


def gptq(**changes: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128} | changes}


def awq(**changes: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128} | changes}


FOREIGN = {
    "Qwen": ({"model_type": "qwen2"}, r"model_type is 'qwen2', expected llama or mistral$"),
    "Gemma": ({"model_type": "gemma"}, r"model_type is 'gemma', expected"),
    "vision": ({"model_type": "mllama"}, r"model_type is 'mllama', expected"),
    "a vision part": (
        {"vision_config": {"hidden_size": 8}},
        r"vision_config is .*: an architecture that npllama does not compute$",
    ),
    "no type": ({"model_type": None}, r"model_type is None, expected"),
    "experts": ({"num_local_experts": 8}, r"num_local_experts is 8: an architecture that npllama does not compute$"),
    "layers of kinds": ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has layers other than"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        r"the weights are quantized by bitsandbytes, expected float32, .* GPTQ or AWQ$",
    ),
    "GPTQ of 3 bits": (gptq(bits=3), r"quantization_config: bits is 3, expected 4 or 8$"),
    "GPTQ of 2 bits": (gptq(bits=2), r"bits is 2, expected 4 or 8$"),
    "GPTQ, marlin": (gptq(is_marlin_format=True), r"checkpoint_format is 'marlin', expected gptq or gptq_v2$"),
    "GPTQ, bitblas": (gptq(checkpoint_format="bitblas"), r"checkpoint_format is 'bitblas', expected gptq or gptq_v2$"),
    "GPTQ, words of 16": (gptq(pack_dtype="int16"), r"pack_dtype is 'int16', expected int32$"),
    "GPTQ, no groups": (gptq(group_size=None), r"group_size is None, expected a number of columns, or -1$"),
    "AWQ, gemv": (awq(version="GEMV"), r"version is 'gemv', expected gemm$"),
    "AWQ, gemv_fast": (awq(version="gemv_fast"), r"version is 'gemv_fast', expected gemm$"),
    "AWQ, marlin": (awq(version="marlin"), r"version is 'marlin', expected gemm$"),
    "AWQ, llm-awq": (awq(backend="llm-awq"), r"version is 'llm-awq', expected gemm$"),
    "AWQ of 8 bits": (awq(bits=8), r"bits is 8, expected 4$"),
    "AWQ, symmetric": (awq(zero_point=False), r"zero_point is False, expected True$"),
    "compressed": ({"compression_config": {"format": "int"}}, r"compression_config is .*: an architecture"),
    "another gate": ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', expected 'silu'$"),
    "half rotation": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5, expected 1"),
    "yarn": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
        r"rope_type is 'yarn', expected default, linear, llama3 or dynamic$",
    ),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, r"missing factor$"),
    "no context": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
        r"missing original_max_position_embeddings$",
    ),
    "rope a list": ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object or null$"),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_what_is_no_plain_llama_is_refused_before_any_weight_is_looked_at(tmp_path, fault):
    changes, expected = FOREIGN[fault]
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5), **changes)
    (src / "model.safetensors").write_bytes(b"never read")
    refused(src, tmp_path / "m", rf"config\.json: .*{expected}")


@pytest.mark.parametrize(
    "harmless", [{"num_local_experts": 0}, {"model_type": "mistral", "sliding_window": None}, {"moe": False}]
)
def test_keys_that_say_no_are_harmless(tmp_path, harmless):
    params = tiny.random_params(CONFIG, seed=5)
    convert(foreign.write_hf(tmp_path / "src", CONFIG, params, **harmless), tmp_path / "m")
    assert_same(tmp_path / "m", params)


BAD_CONFIG = {
    "no eps": ({"rms_norm_eps": None}, "missing rms_norm_eps$"),
    "no width": ({"hidden_size": None}, "missing hidden_size$"),
    "text": ({"hidden_size": "96"}, "hidden_size is '96', expected a positive whole number$"),
    "the smallest theta": (
        {"rope_parameters": {"rope_theta": 5e-324}},
        r"rope_theta is 5e-324, expected a positive number from 1e",
    ),
    "an endless width": ({"hidden_size": 10**400}, r"hidden_size is inf, expected a positive whole number$"),
    "endless layers": ({"num_hidden_layers": 2**31 - 1}, r"2147483647 layers are announced, but there are only 12 tensors$"),
    "more layers": ({"num_hidden_layers": 2}, r"model\.layers\.1\..* and 6 more are missing$"),
    "fewer rows": ({"vocab_size": 130}, r"model\.embed_tokens\.weight is \[131, 96\], expected \[130, 96\]$"),
    "heads": ({"head_dim": None, "num_attention_heads": 5}, "hidden_size 96 is not a multiple of num_attention_heads 5$"),
    "odd heads": ({"head_dim": 15}, "head_dim 15 is odd"),
    "kv heads": ({"num_key_value_heads": 4}, "n_heads 6 is not a multiple of n_kv_heads 4$"),
}


@pytest.mark.parametrize("fault", BAD_CONFIG)
def test_nonsense_in_config_json_is_one_line(tmp_path, fault):
    changes, expected = BAD_CONFIG[fault]
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5), **changes)
    refused(src, tmp_path / "m", expected)


def test_biases_and_strange_tensors_are_refused_by_name(tmp_path):
    from safetensors.numpy import load_file, save_file

    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5))
    tensors = load_file(src / "model.safetensors")
    for name, array, expected in [
        ("model.layers.0.self_attn.q_proj.bias", np.ones(96), r"q_proj\.bias: Llama has no biases"),
        ("model.layers.0.mlp.gate.weight", np.ones(96), r"mlp\.gate\.weight is unexpected$"),
        ("model.layers.0.mlp.down_proj.qweight", np.ones(96, np.int32), r"qweight is 'I32', expected F32, F16, BF16"),
    ]:
        save_file(tensors | {name: array}, src / "model.safetensors")
        refused(src, tmp_path / "m", expected)


def headed(header: object, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes) -> dict:
    return {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


BAD_SAFETENSORS = {
    "empty": (b"", "a header of 0 bytes in a file of 0$"),
    "seven bytes": (b"1234567", "a header of 0 bytes in a file of 7$"),
    "a header beyond the file": (struct.pack("<Q", 1000) + b"{}", r"a header of 1,000 bytes in a file of 10$"),
    "gigabytes of header": (
        struct.pack("<Q", 1 << 62) + b"{}",
        r"a header of 4,611,686,018,427,387,904 bytes in a file of 10$",
    ),
    "not JSON": (headed(b"{nonsense"), "its header is not a JSON object$"),
    "not text": (headed(b"{\xff\xfe"), "its header is not a JSON object$"),
    "nested": (headed(b"[" * 100_000), "its header is not a JSON object$"),
    "a list": (headed([1]), "its header is not a JSON object$"),
    "a tensor that is text": (headed({"x": "y"}), r"x has shape None at None, expected whole numbers$"),
    "negative": (headed(entry(shape=[-4, -4])), r"x has shape \[-4, -4\]"),
    "fractions": (headed(entry(shape=[4.0, 4])), r"x has shape \[4\.0, 4\]"),
    "overflowing": (headed(entry(shape=[1 << 62, 1 << 62])), r"is said to be at \[0, 64\] of 64 bytes$"),
    "before the data": (headed(entry(data_offsets=[-64, 0])), r"at \[-64, 0\], expected whole numbers$"),
    "after the data": (headed(entry(data_offsets=[64, 128])), r"said to be at \[64, 128\] of 64 bytes$"),
    "too short": (headed(entry(data_offsets=[0, 60])), r"said to be at \[0, 60\] of 64 bytes$"),
    "backwards": (headed(entry(data_offsets=[64, 0])), r"said to be at \[64, 0\]"),
    "unknown dtype": (headed(entry(dtype="F8_E4M3")), r"x is 'F8_E4M3', expected F32, F16, BF16, F64$"),
    "dtype a list": (headed(entry(dtype=["F32"])), r"x is \['F32'\], expected F32"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n", "not a safetensors file"),
}


@pytest.mark.parametrize("fault", BAD_SAFETENSORS)
def test_a_damaged_safetensors_file_is_one_line(tmp_path, fault):
    content, expected = BAD_SAFETENSORS[fault]
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5))
    (src / "model.safetensors").write_bytes(content)
    refused(src, tmp_path / "m", r"model\.safetensors.*" + expected)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b.safetensors", "..", "", "C:x", "a\\b", "a\0b", 7])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5), n_shards=2)
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(
        src, tmp_path / "m", r"index\.json: 'model\.norm\.weight' is in .*, expected the name of a file in the same folder$"
    )


BAD_INDEX = {
    "a lost file": (
        lambda src: (src / "model-00002-of-00002.safetensors").unlink(),
        r"'model-00002-of-00002\.safetensors' is missing$",
    ),
    "no map": (lambda src: (src / "model.safetensors.index.json").write_text("{}"), r"weight_map is NoneType, expected"),
    "an empty map": (
        lambda src: (src / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        r"weight_map is dict",
    ),
    "absurdly long": (
        lambda src: os.truncate(src / "model.safetensors.index.json", 1 << 34),
        r"index\.json is 17,179,869,184 bytes, expected at most 4,194,304$",
    ),
    "swapped": (
        lambda src: (
            os.replace(src / "model-00002-of-00002.safetensors", src / "model-00001-of-00002.safetensors")
            or shutil.copy(src / "model-00001-of-00002.safetensors", src / "model-00002-of-00002.safetensors")
        ),
        r"should be in model-00001-of-00002\.safetensors, which does not hold it$",
    ),
}


@pytest.mark.parametrize("fault", BAD_INDEX)
def test_an_index_that_is_wrong_is_one_line(tmp_path, fault):
    spoil, expected = BAD_INDEX[fault]
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5), n_shards=2)
    spoil(src)
    refused(src, tmp_path / "m", expected)


def test_a_folder_without_weights_says_what_is_expected(tmp_path):
    src = foreign.write_hf(tmp_path / "src", CONFIG, tiny.random_params(CONFIG, seed=5))
    (src / "model.safetensors").unlink()
    refused(src, tmp_path / "m", r"src has no weights: expected model\.safetensors, ")
    (src / "config.json").unlink()
    refused(src, tmp_path / "m", r"src holds no checkpoint: expected a folder of Meta's or Hugging Face's")
