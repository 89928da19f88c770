"""Compare with llama.cpp: the ids of GGUF vocabularies on 10,000 mixed texts, and the forward pass.

Where llama.cpp isn't the source library's equal, the difference is named here and its cases are counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from npllama import Config, forward, load, parameter_shapes
from npllama.tokenizer import Tokenizer, load_tokenizer
from npllama_convert.gguf_vocabulary import PRE_TOKENIZERS

from llamacpp_server import LlamaCpp
from make_corpus import as_unicode
from tiny import CONFIGS, config, random_params
from tokenizer_judges import CORPUS, Judge, mismatches, sentencepiece_judge
from vocabularies import metadata_of_json, metadata_of_sentencepiece, metadata_of_tiktoken, write

if importlib.util.find_spec("xllamacpp") is None:  # imported in the server's process only: it is 100 MB of llama.cpp
    pytest.skip("xllamacpp is not installed", allow_module_level=True)
pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
from conversions import convert
from foreign import write_gguf


def vocabulary_only(folder: Path, metadata: dict[str, object]) -> Path:
    """Write a GGUF file with this vocabulary and the smallest model that llama.cpp opens."""
    shape = config(vocab_size=len(metadata["tokenizer.ggml.tokens"]), dim=32, n_heads=2, n_kv_heads=1, n_layers=1, ffn_dim=32)
    params = {name: np.zeros(size, np.float32) for name, size in parameter_shapes(shape).items()}
    return write_gguf(folder / "model.gguf", shape, params, **gguf_keys(metadata))


def gguf_keys(metadata: dict[str, object]) -> dict[str, object]:
    return {name.replace(".", "__"): value for name, value in metadata.items() if name.startswith("tokenizer.ggml.")}


# ------------------------------------------------------------------------------------------------------------------- the ids


@contextlib.contextmanager
def ours_and_theirs(metadata: dict[str, object], folder: Path) -> Iterator[tuple[Tokenizer, LlamaCpp]]:
    """Return npllama's and llama.cpp's tokenizers for a GGUF vocabulary."""
    tokenizer = load_tokenizer(write(metadata, folder))
    with LlamaCpp(vocabulary_only(folder, metadata)) as judge:
        yield tokenizer, judge


def differing(tokenizer: Tokenizer, judge: Judge, special: bool = False, texts: list[str] = CORPUS) -> list[str]:
    """Return the texts whose ids differ; with special tokens, only of the texts that may spell one, as in mismatches()."""
    texts = [text for text in texts if "<" in text] if special else texts
    return [text for text in texts if tokenizer.encode(text, special=special) != judge(as_unicode(text))]


@pytest.mark.slow
def test_llama3(llama3_tokenizer: Tokenizer, tmp_path: Path) -> None:
    metadata = metadata_of_tiktoken(Path(os.environ["NPLLAMA_LLAMA3_TOKENIZER"]))
    with ours_and_theirs(metadata, tmp_path) as (tokenizer, judge):
        assert mismatches(tokenizer, judge.tokenize) == []
        assert mismatches(tokenizer, judge.tokenize_special, special=True) == []


@pytest.mark.slow
def test_smollm2(smollm2_metadata: dict[str, object], tmp_path: Path) -> None:
    with ours_and_theirs(smollm2_metadata, tmp_path) as (tokenizer, judge):
        # \x16 is not in SmolLM2's vocabulary. Ours drops it before the merges, as tokenizers does, llama.cpp after them:
        # test_smollm2_loses_what_needs_its_missing_bytes in test_tokenizer_corpus.py.
        assert differing(tokenizer, judge.tokenize) == ["\0 \x1d\x16\u0658\u022f"]
        assert mismatches(tokenizer, judge.tokenize_special, special=True) == []


@pytest.mark.slow
def test_llama2(shared_data: Path, tmp_path: Path) -> None:
    metadata = metadata_of_sentencepiece(shared_data / "llama2-tokenizer" / "tokenizer.model")
    with ours_and_theirs(metadata, tmp_path) as (tokenizer, judge):
        assert mismatches(tokenizer, judge.tokenize) == []
        # Where special tokens are meant, llama.cpp takes <unk> for one. To SentencePiece it is no control symbol, so not to us.
        unknown = [text for text in CORPUS if "<unk>" in text]
        assert differing(tokenizer, judge.tokenize_special, special=True) == unknown
        assert len(unknown) == 212
        assert differing(tokenizer, judge.tokenize_special, True, [text.replace("<unk>", "<unk ") for text in unknown]) == []


def test_a_sentencepiece_model_that_collapses_blanks(shared_data: Path, tmp_path: Path) -> None:
    # llama.cpp ignores remove_extra_whitespaces for this kind of vocabulary; SentencePiece and ours do what it says.
    file, texts = shared_data / "stories260K" / "tokenizer.model", CORPUS[::5]
    metadata = metadata_of_sentencepiece(file, remove_extra_whitespaces=True)
    with ours_and_theirs(metadata, tmp_path) as (tokenizer, judge):
        assert differing(tokenizer, sentencepiece_judge(file), texts=texts) == []
        assert len(differing(tokenizer, judge.tokenize, texts=texts)) == 630
        assert (
            differing(tokenizer, lambda text: judge.tokenize(re.sub(" +", " ", text).lstrip(" ").rstrip(" ▁")), texts=texts)
            == []
        )


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer(pre: str, tiny_chatml_file: Path, tmp_path: Path) -> None:
    texts = CORPUS[::10]
    with ours_and_theirs(metadata_of_json(tiny_chatml_file, pre), tmp_path) as (tokenizer, judge):
        found = differing(tokenizer, judge.tokenize, texts=texts)
        special = differing(tokenizer, judge.tokenize_special, special=True, texts=texts)
        if pre == "tekken":
            # llama.cpp's pattern doesn't count combining marks among the letters; that of the published tokenizer.json does.
            assert all(any(unicodedata.category(char)[0] == "M" for char in as_unicode(text)) for text in {*found, *special})
            assert (len(found), len(special)) == (72, 8)
        else:
            assert found == special == []


# ---------------------------------------------------------------------------------------------------------- the forward pass


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_continues_as_ours(
    judge: LlamaCpp, config: Config, params: Mapping[str, np.ndarray], prompt: list[int], n: int, n_probs: int, atol: float
) -> None:
    """Check that llama.cpp's n greedy tokens equal npllama's, ties within rounding aside, and the log-probabilities too."""
    answer = judge.ask("/completion", prompt=prompt, n_predict=n, temperature=0, n_probs=n_probs)
    steps = answer["completion_probabilities"]
    ids = [step["id"] for step in steps]
    assert len(ids) == n
    ours = log_softmax(forward(params, config, [*prompt, *ids[:-1]])[len(prompt) - 1 :])
    for row, step in zip(ours, steps, strict=True):
        assert row.max() - row[step["id"]] <= 2 * atol
        assert len(step["top_logprobs"]) == n_probs
        for top in step["top_logprobs"]:
            assert row[top["id"]] == pytest.approx(top["logprob"], rel=0, abs=atol)


def placeholders(n: int) -> dict[str, object]:
    """Return metadata of n meaningless tokens: llama.cpp needs a vocabulary."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(n)],
        "tokenizer.ggml.token_type": [1] * n,
        "tokenizer.ggml.merges": ["t 0"],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_float32(name: str, tmp_path: Path) -> None:
    config, params = CONFIGS[name], random_params(CONFIGS[name], seed=3)
    path = write_gguf(tmp_path / "model.gguf", config, params, **gguf_keys(placeholders(config.vocab_size)))
    prompt = [(7 * i + i * i) % config.vocab_size for i in range(40)]
    with LlamaCpp(path) as judge:
        assert_continues_as_ours(judge, config, params, prompt, 6, n_probs=config.vocab_size, atol=2e-5)


def test_q8_0(tmp_path: Path) -> None:
    # llama.cpp rounds the activations to 8 bits too before it multiplies, hence the tolerance; the weights are the same.
    config, params = CONFIGS["grouped"], random_params(CONFIGS["grouped"], seed=3)
    path = write_gguf(tmp_path / "model.gguf", config, params, "Q8_0", **gguf_keys(placeholders(config.vocab_size)))
    convert(path, tmp_path / "model")
    model = load(tmp_path / "model", dtype="float32")
    prompt = [(7 * i + i * i) % config.vocab_size for i in range(40)]
    with LlamaCpp(path) as judge:
        assert_continues_as_ours(judge, config, model.params, prompt, 6, n_probs=config.vocab_size, atol=0.1)


@pytest.mark.slow
def test_smollm2_in_float32(smollm2: Path, smollm2_metadata: dict[str, object], tmp_path: Path) -> None:
    model = load(smollm2, dtype="float32")
    path = write_gguf(tmp_path / "model.gguf", model.config, model.params, **gguf_keys(smollm2_metadata))
    prompt = model.tokenizer.encode("<|im_start|>user\nTell me about the sea.<|im_end|>\n<|im_start|>assistant\n", special=True)
    with LlamaCpp(path) as judge:
        assert_continues_as_ours(judge, model.config, model.params, prompt, 24, n_probs=100, atol=5e-4)
    path.unlink()  # half a gigabyte


def test_no_pre_tokenizer_is_the_default_one(tiny_chatml_file: Path, tmp_path: Path) -> None:
    metadata = metadata_of_json(tiny_chatml_file, "default")
    del metadata["tokenizer.ggml.pre"]
    with ours_and_theirs(metadata, tmp_path) as (tokenizer, judge):
        assert differing(tokenizer, judge.tokenize, texts=CORPUS[::20]) == []


@pytest.mark.parametrize("kind", [3, 4])
def test_tokens_added_to_a_sentencepiece_vocabulary(kind: int, tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    """Test a ChatML fine-tune on LLaMA's vocabulary, whose new tokens are control or user-defined tokens."""
    metadata = metadata_of_sentencepiece(tiny_sentencepiece_file, eos_token_id=330)
    added = ["<|im_end|>", "<|im_start|>", "<tool>", "<tools>"]
    metadata["tokenizer.ggml.tokens"] += added
    metadata["tokenizer.ggml.scores"] += [-1000.0] * len(added)
    metadata["tokenizer.ggml.token_type"] += [kind] * len(added)
    texts = ["<|im_start|>user\nOnce upon<|im_end|>\n", "Once <tool> upon<tools>a  <tool>", "<tools>", " a<|im_end|> b ", ""]
    with ours_and_theirs(metadata, tmp_path) as (tokenizer, judge):
        for text in texts:
            assert tokenizer.encode(text, special=True) == judge.tokenize_special(text)
        for text in texts[1:3]:  # without ChatML's tokens, whose spelling is text to us whatever their kind
            assert tokenizer.encode(text) == judge.tokenize(text)
        assert tokenizer.special_tokens.keys() >= {"<|im_start|>", "<|im_end|>"}
        assert tokenizer.stop_ids == {330}
