"""Test the server with programs that others wrote for OpenAI's API: lm-evaluation-harness, and the command llm."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

import npllama

import tiny
from system import ROOT

pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")

from serving import served

WORDS = ["he", "said", "she", "ran", "to", "the", "park", "with", "her", "ball", "and", "it", "was", "late", "in", "may"]
QUESTIONS = """\
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """\
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
"""
ANSWERS = """\
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder) -> None:
    """Write 20 documents, and tasks of each kind of request that lm-eval makes."""
    draw = random.Random(0)

    def sentence(n):
        return " ".join(draw.choice(WORDS) for _ in range(n))

    documents = [
        {"text": sentence(draw.randrange(3, 12)), "choices": [sentence(n) for n in (1, 2, 2, 3)], "answer": draw.randrange(4)}
        for _ in range(20)
    ]
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, text in (("questions", QUESTIONS), ("texts", TEXTS), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text % file)


@pytest.mark.torch
@pytest.mark.slow
def test_lm_eval_finds_what_it_finds_in_torch(tmp_path, tiny_llama3_json_file):
    """Compare results by local-completions with those of lm-eval's own torch backend on the same weights."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    hf = pytest.importorskip("hf_reference", reason="transformers is not installed", exc_type=ImportError)
    from npllama_convert.sources import convert

    tokenizer = npllama.load_tokenizer(tiny_llama3_json_file)
    config = tiny.config(dim=48, n_heads=4, head_dim=12, ffn_dim=96, vocab_size=tokenizer.vocab_size)
    params = tiny.random_params(config, seed=3)
    end = tokenizer.special_tokens["<|end_of_text|>"]
    params["output.weight"][end] *= 2.5  # often the likeliest token: the end of a text must cost no log-probability
    source = tmp_path / "hf"
    hf.hf_model(config, params).save_pretrained(source)
    (source / "tokenizer.json").write_bytes(tiny_llama3_json_file.read_bytes())
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": tokenizer.bos_id, "eos_token_id": end}))
    convert(source, tmp_path / "model", report=lambda line: None)
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    with served(npllama.load(tmp_path / "model")) as server:
        command = [sys.executable, str(ROOT / "tests/helpers/lm_eval_judge.py"), str(source)]
        command += [f"http://127.0.0.1:{server.port}/v1/completions", str(tmp_path / "tasks")]
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    theirs, ours = found["hf"], found["api"]
    for name in ("questions", "texts"):
        assert len(ours[name]["samples"]) == 20
        # Measured: 1.4e-7 of the sum of a text's log-probabilities.
        np.testing.assert_allclose(flat(ours[name]["samples"]), flat(theirs[name]["samples"]), rtol=1.5e-6)
    assert ours["answers"] == theirs["answers"]
    assert len({text for (text,) in ours["answers"]["samples"]}) > 5
    for name in ("acc", "acc_norm"):
        assert 0 < ours["questions"][name] == theirs["questions"][name] < 1
    assert ours["texts"]["word_perplexity"] == pytest.approx(theirs["texts"]["word_perplexity"], rel=1e-5)


def flat(samples: list) -> np.ndarray:
    """Return all numbers of the answers: log-likelihoods, and whether greedy decoding gives the text."""
    return np.concatenate([np.ravel(answers).astype(float) for answers in samples])


@pytest.fixture
def llm(tmp_path):
    """Return a function that runs the command llm, configured with the server's model for texts and for chats."""
    if importlib.util.find_spec("llm") is None:
        pytest.skip("llm is not installed")
    with served(npllama.load()) as server:
        api = {"model_name": "demo", "api_base": f"http://127.0.0.1:{server.port}/v1"}
        models = [{"model_id": "here", **api}, {"model_id": "here-text", "completion": True, **api}]
        (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML

        def run(*arguments: str) -> str:
            environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
            command = [sys.executable, "-m", "llm", *arguments, "-o", "temperature", "0", "-o", "max_tokens", "30"]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, done.stderr
            return done.stdout.removesuffix("\n")

        yield run


@pytest.mark.slow
def test_llm_chats_and_completes(llm):
    """Run Simon Willison's command for language models: a text, and a conversation whose history it sends again."""
    model = npllama.load()
    chat, other = (npllama.Conversation(model, sampling=npllama.Sampling(), max_tokens=30) for _ in range(2))
    assert llm("-m", "here-text", "ROMEO:") == npllama.complete(model, "ROMEO:", max_tokens=30).text
    assert llm("-m", "here", "Good morrow") == chat.say("Good morrow")
    second = chat.say("What said he?")
    assert second != other.say("What said he?")
    assert llm("-c", "--no-stream", "What said he?") == second
