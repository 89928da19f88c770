"""Exactness: every kind of tokenizer gives the source library's ids on 10,000 mixed texts. No mismatch is allowed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from npllama.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS, BytePairEncoding, Tokenizer, load_tokenizer

from make_corpus import make_corpus
from tokenizer_judges import CORPUS, Judge, mismatches, sentencepiece_judge, smollm2_library
from vocabularies import byte_of_char, metadata_of_sentencepiece, metadata_of_tiktoken, write


def hugging_face_judge(library, special: bool = False) -> Judge:
    library.encode_special_tokens = not special
    return lambda text: library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def test_the_corpus_holds_what_it_should() -> None:
    assert len(CORPUS) == len(set(CORPUS)) == 10_000
    assert make_corpus(100) == CORPUS[:100]
    everything = "\0".join(CORPUS)
    scripts = ["don't", "def f(x):", "你好", "مرحبا", "नमस्ते", "안녕하세요", "Привет", "người", "👩\u200d👩\u200d👧\u200d👦"]
    runs = ["3.14159", "    ", "\n\n\n", "\r\n", "e\u0301", "\U0001f999\u200d"]
    for part in [*scripts, *runs, "\ufffd", "\udcff", "\x00", "<|eot_id|>", "<|im_start|>", "</s>"]:
        assert part in everything
    with pytest.raises(UnicodeEncodeError):
        everything.encode()


# Llama 3: a tiktoken file.


@pytest.fixture(scope="module")
def llama3_judge(llama3_tokenizer: Tokenizer):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache
        ranks = load_tiktoken_bpe(os.environ["NPLLAMA_LLAMA3_TOKENIZER"])
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    return tiktoken.Encoding("judge", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def test_llama3(llama3_tokenizer: Tokenizer, llama3_judge) -> None:
    assert mismatches(llama3_tokenizer, llama3_judge.encode_ordinary) == []
    assert mismatches(llama3_tokenizer, lambda text: llama3_judge.encode(text, allowed_special="all"), special=True) == []


def test_llama3_without_tiktoken(llama3_tokenizer: Tokenizer, llama3_judge, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("regex", reason="regex is not installed")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = load_tokenizer(os.environ["NPLLAMA_LLAMA3_TOKENIZER"])
    assert mismatches(tokenizer, llama3_judge.encode_ordinary) == []
    assert mismatches(tokenizer, lambda text: llama3_judge.encode(text, allowed_special="all"), special=True) == []
    assert type(tokenizer.encoding) is BytePairEncoding


@pytest.mark.once
def test_llama3_as_a_gguf_vocabulary(llama3_judge, tokenizers, tmp_path: Path) -> None:
    metadata = metadata_of_tiktoken(Path(os.environ["NPLLAMA_LLAMA3_TOKENIZER"]))
    tokenizer = load_tokenizer(write(metadata, tmp_path))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.adds_bos) == (128256, 128000, True)
    assert tokenizer.stop_ids == {128001, 128008, 128009}
    assert mismatches(tokenizer, llama3_judge.encode_ordinary) == []
    assert mismatches(tokenizer, lambda text: llama3_judge.encode(text, allowed_special="all"), special=True) == []


# LLaMA 1 and 2: SentencePiece, also by way of GGUF and of a tokenizer.json.


def test_llama2(llama2_tokenizer: Tokenizer, shared_data: Path) -> None:
    judge = sentencepiece_judge(shared_data / "llama2-tokenizer" / "tokenizer.model")
    assert mismatches(llama2_tokenizer, judge) == []


def test_llama2_as_a_gguf_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "llama2-tokenizer" / "tokenizer.model"
    assert mismatches(load_tokenizer(write(metadata_of_sentencepiece(path), tmp_path)), sentencepiece_judge(path)) == []


def test_sentencepiece_as_a_tokenizer_json(tiny_llama2_json: Tokenizer, tiny_llama2_json_file: Path, tokenizers) -> None:
    for special in (False, True):
        library = tokenizers.Tokenizer.from_file(str(tiny_llama2_json_file))
        assert mismatches(tiny_llama2_json, hugging_face_judge(library, special), special) == []


def test_sentencepiece_as_a_tokenizer_json_is_sentencepiece(tiny_llama2_json: Tokenizer, tiny_sentencepiece_file: Path) -> None:
    assert mismatches(tiny_llama2_json, sentencepiece_judge(tiny_sentencepiece_file)) == []


# Byte-level tokenizer.json, and SmolLM2's GGUF.


@pytest.mark.parametrize("kind", ["tiny_chatml", "tiny_llama3_json"])
def test_byte_level_tokenizer_json(kind: str, tokenizers, request: pytest.FixtureRequest) -> None:
    for special in (False, True):
        library = tokenizers.Tokenizer.from_file(str(request.getfixturevalue(kind + "_file")))
        assert mismatches(request.getfixturevalue(kind), hugging_face_judge(library, special), special) == []


@pytest.fixture(scope="module")
def smollm2_judge(smollm2_metadata: dict[str, object], tokenizers):
    """Return SmolLM2's tokenizer in its publisher's library."""
    return smollm2_library(smollm2_metadata)


def test_smollm2(smollm2_tokenizer: Tokenizer, smollm2_judge) -> None:
    for special in (False, True):
        assert mismatches(smollm2_tokenizer, hugging_face_judge(smollm2_judge, special), special) == []
    for text in CORPUS[::5]:
        ids = smollm2_tokenizer.encode(text, special=True)
        assert smollm2_tokenizer.decode(ids) == smollm2_judge.decode(ids, skip_special_tokens=False)


def test_smollm2_known_ids(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49152
    assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_id, smollm2_tokenizer.adds_bos) == (1, 2, False)
    assert smollm2_tokenizer.stop_ids == {0, 2}
    assert list(smollm2_tokenizer.special_tokens.values()) == list(range(17))
    ids = smollm2_tokenizer.encode("What is 123?", bos=True)
    assert [smollm2_tokenizer.piece(id) for id in ids] == ["What", " is", " ", "1", "2", "3", "?"]


def test_smollm2_loses_what_needs_its_missing_bytes(smollm2_tokenizer: Tokenizer, smollm2_metadata) -> None:
    # tokenizers drops them before it merges, llama.cpp after: the one text of the corpus whose ids differ there.
    missing = {byte for char, byte in byte_of_char().items() if char not in smollm2_metadata["tokenizer.ggml.tokens"]}
    assert missing == {*b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2", *range(0xF5, 0x100)}
    assert smollm2_tokenizer.encode("a\x04b") == smollm2_tokenizer.encode("a") + smollm2_tokenizer.encode("b")
