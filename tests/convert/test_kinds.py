"""Kinds of checkpoints that people reported to other converters and runtimes: each is read, or its real fault is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from npllama import generate, load
from npllama.checkpoint import open_model

import foreign
import tiny
from foreign import convert


@pytest.fixture(autouse=True)
def quick(quick_conversion) -> None:
    """Small blocks, and no waiting for the disk."""


def write(folder: Path, n_rows: int, tokenizer: Path, **changes: object) -> Path:
    """A folder of Hugging Face's with so many rows and this tokenizer, whatever belongs to it included."""
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
    assert open_model(tmp_path / "m").generation["chat_format"] == "chatml"
