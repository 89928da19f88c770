"""The embedded model: its files, its answers, and the same model as a torch checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest

import npllama
from npllama.checkpoint import demo_path, sha256, verify

from cases import golden
from tiny import relative_error


def test_it_is_whole_and_small():
    assert verify(demo_path()) == []
    assert sum(file.stat().st_size for file in demo_path().iterdir()) <= 6_000_000
    assert {"MODEL_CARD.md", "training.json"} <= {file.name for file in demo_path().iterdir()}


def test_it_is_a_small_llama_3():
    model = npllama.load()
    config = model.config
    assert config.n_heads // config.n_kv_heads > 1
    assert config.rope_theta == 500000.0
    assert model.manifest["dtype"] in ("bfloat16", "float16")
    assert config.vocab_size == model.tokenizer.vocab_size == 2256
    assert model.tokenizer.special_tokens["<|begin_of_text|>"] == 2000


@pytest.fixture(scope="module")
def recorded():
    recorded = golden("demo")
    assert json.loads(str(recorded["about"]))["manifest_sha256"] == sha256(demo_path() / "manifest.json"), (
        "the golden was made with another demo model: run tests/make_goldens.py"
    )
    return recorded


@pytest.mark.parametrize("dtype", ["stored", "float32", "float64"])
def test_its_logits_are_torch_s(recorded, dtype):
    model = npllama.load(dtype=dtype)
    tokens = model.tokenizer.encode(json.loads(str(recorded["about"]))["prompt"], bos=True)
    assert tokens == recorded["tokens"].tolist()
    logits = npllama.forward(model.params, model.config, tokens)
    assert relative_error(logits, recorded["float64/logits" if dtype == "float64" else "float32/logits"]) < 7e-6
    if dtype == "float64":  # recorded in float32: half a unit in its last place
        assert relative_error(logits, recorded["float64/logits"]) < 6e-8


@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_its_greedy_tokens_are_hugging_face_s(recorded, dtype):
    model = npllama.load(dtype=dtype)
    made = list(npllama.generate(model, recorded["tokens"].tolist(), max_tokens=48, stop_ids=[]))
    assert made == recorded["greedy"].tolist()


def test_it_writes_speeches():
    """Find a line with a name in capitals and a colon, and lines of verse, in 200 tokens."""
    model = npllama.load()
    ids = model.tokenizer.encode("ROMEO:", bos=True)
    text = model.tokenizer.decode(list(npllama.generate(model, ids, max_tokens=200, temperature=0.8, top_p=0.95)))
    lines = text.splitlines()
    assert any(line.endswith(":") and line[:-1].replace(" ", "").isupper() for line in lines), text
    assert sum(20 < len(line) < 80 for line in lines) >= 5, text


@pytest.mark.torch
@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1)], ids=str)
def test_as_a_torch_checkpoint_it_converts_to_the_same_files(shards, embedding_axis, tmp_path):
    from npllama_convert.sources import convert

    from to_meta import to_meta

    to_meta(demo_path(), tmp_path / "meta", shards=shards, embedding_axis=embedding_axis)
    convert(tmp_path / "meta", tmp_path / "again")
    ours, again = (npllama.checkpoint.open_model(path) for path in (demo_path(), tmp_path / "again"))
    assert again.config == ours.config
    for name, x in ours.params.items():
        assert x.dtype == again.params[name].dtype
        np.testing.assert_array_equal(again.params[name], x)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (demo_path() / "tokenizer.model").read_bytes()
