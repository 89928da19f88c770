"""Known answers of real models: stories260K from its torch checkpoint, SmolLM2 as npllama fetch gets it; npllama check."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest

import npllama
from npllama.checkpoint import demo_path
from npllama.cli import main, options
from npllama.evaluate import known_answers
from npllama.evaluate.known_answers import STORY, Answer, KnownModel
from npllama_convert.meta import resolve
from npllama_convert.published import PUBLISHED

from tiny import relative_error


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """Return stories260K converted to each storage dtype."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("stories")
    for dtype in ("float32", "float16", "bfloat16"):
        assert main(["convert", str(shared_data / "stories260K"), str(folder / dtype), "--dtype", dtype]) == 0
    return folder


@pytest.mark.torch
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [("float32", "stored"), ("float32", "float64"), ("float16", "stored"), ("float16", "float32")],
    ids="-".join,
)
def test_the_story_to_the_character(stories, storage, dtype, capsys):
    assert main(["generate", "", "-m", str(stories / storage), "-n", "200", "--dtype", dtype, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == STORY


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["stored", "float32"])
def test_with_bfloat16_weights_the_tokens_are_hugging_face_s_on_the_same_weights(stories, dtype):
    """Compare with rounded weights, which continue differently after 185 tokens, in torch as well."""
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    model = npllama.load(stories / "bfloat16", dtype=dtype)
    assert model.params["layers.0.attention.wq.weight"].dtype == ("uint16" if dtype == "stored" else "float32")
    widened = npllama.load(stories / "bfloat16", dtype="float32")
    judge = hf.hf_model(widened.config, widened.params)
    expected = hf.hf_greedy(judge, [model.tokenizer.bos_id], 200)
    assert list(npllama.generate(model, [model.tokenizer.bos_id], max_tokens=200)) == expected
    story = model.tokenizer.encode(STORY)
    assert expected[:150] == story[:150]
    assert expected != story[:200]


@pytest.mark.torch
def test_logits_are_hugging_face_s(stories):
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    model = npllama.load(stories / "float32", dtype="stored")
    tokens = np.array(model.tokenizer.encode(STORY, bos=True))
    expected = hf.hf_logits(hf.hf_model(model.config, model.params), tokens)
    assert relative_error(npllama.forward(model.params, model.config, tokens), expected) < 1e-5


@pytest.mark.torch
def test_the_converted_config_is_what_the_checkpoint_says(stories):
    values = json.loads((stories / "float32" / "config.json").read_text())
    facts = {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "ffn_dim": 172, "vocab_size": 512}
    assert {key: values[key] for key in facts} == facts
    assert values["norm_eps"] == 1e-5
    assert values["rope_theta"] == 10000.0
    assert values["rope_scaling"] is None


# ----------------------------------------------------------------------------------------------------------------- SmolLM2


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    assert main(["chat", "-m", str(smollm2), "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


@pytest.mark.torch
def test_smollm2_logits_are_hugging_face_s(smollm2):
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    model = npllama.load(smollm2, dtype="float32")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = np.array(npllama.chat.chat_format(model).prompt(messages).ids)
    expected = hf.hf_logits(hf.hf_model(model.config, model.params), tokens)
    assert relative_error(npllama.forward(model.params, model.config, tokens), expected) < 1e-5


# ------------------------------------------------------------------------------------------------------------------- check


@pytest.mark.torch
def test_check_stories260k(stories, capsys):
    assert main(["check", str(stories / "float32")]) == 0
    out = capsys.readouterr().out
    assert "has the shape of stories260K" in out
    assert out.count("  ok  ") == 2
    assert main(["check", str(stories / "bfloat16")]) == 1  # rounded weights continue differently after 185 tokens
    assert "FAILED  the text" in capsys.readouterr().out


def test_check_smollm2(smollm2, capsys):
    assert main(["check", str(smollm2)]) == 0
    assert "ok      the text 'The capital of France is Paris.'" in capsys.readouterr().out


@pytest.fixture
def stand_in(monkeypatch):
    """Return the demo model, and a table that lists it as a published model with a right answer of every kind."""
    model = npllama.load()
    tokenizer = model.tokenizer
    ids = tokenizer.encode("ROMEO:", bos=True)
    made = list(npllama.generate(model, ids, max_tokens=12))
    logits = npllama.forward(model.params, model.config, ids)[-1]
    answer = Answer(
        "ROMEO:",
        source="itself",
        ids=tuple(ids),
        next_token=made[0],
        logits=tuple(float(x) for x in logits[:3]),
        tolerance=1e-3,
        n_tokens=12,
        text=tokenizer.decode(made).strip(),
    )

    def table(**changes):
        shape = {"dim": model.config.dim, "rope_scaling": None}
        known = KnownModel("stand-in", shape, (dataclasses.replace(answer, **changes),))
        monkeypatch.setattr(known_answers, "MODELS", [*known_answers.MODELS, known])

    return table


def test_check_holds_every_kind_of_answer(stand_in, capsys):
    stand_in()
    assert main(["check", str(demo_path())]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok  ") == 4
    assert "FAILED" not in out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ids": (1, 2)}, "the prompt's ids"),
        ({"next_token": 7}, "the next token 7: found"),
        ({"logits": (1.0, 2.0, 99.0)}, "the first logits 1, 2, 99 within 0.001: found"),
        ({"text": "To be, or not to be"}, "the text 'To be, or not to be': found"),
        ({"n_tokens": 11}, "the text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_check_finds_every_kind_of_mistake(stand_in, changes, what, capsys):
    stand_in(**changes)
    assert main(["check", str(demo_path())]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert what in line


def test_check_finds_a_wrong_rope_theta(stand_in, monkeypatch, capsys):
    stand_in()
    model = npllama.load()
    model.config = dataclasses.replace(model.config, rope_theta=model.config.rope_theta * 2)
    monkeypatch.setattr(options, "load", lambda *args: model)
    assert main(["check", "model"]) == 1
    assert "FAILED  the first logits" in capsys.readouterr().out


def test_check_puts_a_question_in_the_model_s_own_format(stand_in, monkeypatch, capsys):
    model = npllama.load()
    model.generation = {"chat_format": "llama3", "system": "Be brief."}
    monkeypatch.setattr(options, "load", lambda *args: model)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ROMEO:"}]
    ids = npllama.chat.encode_llama3(model.tokenizer, messages)
    stand_in(chat=True, ids=tuple(ids), next_token=None, logits=(), text=None)
    assert main(["check", "model"]) == 0
    model.generation = {}
    assert main(["check", "model"]) == 2
    assert "has no chat template of its own" in capsys.readouterr().err


def test_check_of_an_unknown_model_or_none(capsys, tmp_path):
    assert main(["check", str(demo_path())]) == 2
    assert "no published answers are known for a model of this shape: expected LLaMA 1 7B" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "not found" in capsys.readouterr().err


RECOGNISED = {
    "LLaMA 7B": "LLaMA 1 7B",
    "Llama 3 8B": "Llama 3 8B (the base model)",
    "SmolLM2 135M": "SmolLM2-135M-Instruct",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_recognised_and_taken_for_no_other(name):
    published = PUBLISHED[name]
    config = resolve(published.params, vocab_size=published.vocabulary, tied=published.tied, report=lambda line: None)
    found = [known.name for known in known_answers.MODELS if known.has_shape(config)]
    assert found == ([RECOGNISED[name]] if name in RECOGNISED else [])


def test_the_prompts_ids_are_the_tokenizers(llama2_tokenizer, llama3_tokenizer):
    llama1, llama3 = (known.answers[0] for known in known_answers.MODELS[:2])
    assert llama2_tokenizer.encode(llama1.prompt, bos=True) == list(llama1.ids)
    assert llama3_tokenizer.encode(llama3.prompt, bos=True) == list(llama3.ids)
    assert llama3_tokenizer.decode([llama3.next_token]) == llama3.text
    whole = llama2_tokenizer.encode(f"{llama1.prompt} {llama1.text}", bos=True)
    assert whole[len(llama1.ids)] == llama1.next_token
    assert len(whole) - len(llama1.ids) == llama1.n_tokens
