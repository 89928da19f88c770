"""Test GGUF vocabularies: the tokenizer rebuilt from one gives the ids of the original tokenizer."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from npllama.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from npllama_convert.gguf_vocabulary import PRE_TOKENIZERS, tokenizer_file

from make_corpus import as_unicode, make_corpus
from vocabularies import metadata_of_json, metadata_of_sentencepiece, write

TEXTS = make_corpus(500, seed=7)


@pytest.mark.parametrize(("source", "pre"), [("tiny_chatml", "smollm"), ("tiny_llama3_json", "llama-bpe")])
def test_a_byte_level_vocabulary(source: str, pre: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    expected: Tokenizer = request.getfixturevalue(source)
    ends = {"bos_token_id": expected.bos_id, "eos_token_id": expected.eos_id}
    found = load_tokenizer(write(metadata_of_json(request.getfixturevalue(source + "_file"), pre, **ends), tmp_path))
    assert type(found) is HuggingFaceTokenizer
    assert found.special_tokens == expected.special_tokens
    for name in ("vocab_size", "bos_id", "eos_id", "adds_bos", "stop_ids"):
        assert getattr(found, name) == getattr(expected, name), name
    for text in TEXTS:
        assert found.encode(text, bos=True) == expected.encode(text, bos=True)
        assert found.encode(text, special=True) == expected.encode(text, special=True)
        assert found.decode(found.encode(text, special=True)) == as_unicode(text)


@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - {"tekken", "deepseek-llm"}))  # written another way there
def test_texts_are_split_as_llama_cpp_splits_them(pre: str, tiny_chatml_file: Path, tmp_path: Path) -> None:
    regex = pytest.importorskip("regex", reason="regex is not installed")  # tiktoken itself depends on it
    import tokenizers

    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    capitals = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    llama3 = capitals + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    seed = capitals + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    # llama.cpp, src/llama-vocab.cpp: each pattern splits what those before it left, matches and what is between them.
    patterns = {
        "gpt-2": [gpt2],
        "default": [r"[\p{P}\$\+<=>\^~\|]+", gpt2, r"\p{N}+", "[0-9][0-9][0-9]"],
        **{name: [r"\p{N}", gpt2] for name in ("smollm", "refact", "starcoder")},
        **{name: [llama3] for name in ("llama-bpe", "llama-v3", "llama3", "falcon3", "smaug-bpe")},
        "seed-coder": [seed],
    }[pre]

    library = tokenizers.Tokenizer.from_file(str(write(metadata_of_json(tiny_chatml_file, pre), tmp_path)))
    for text in map(as_unicode, TEXTS):
        if any(unicodedata.category(char) == "Cn" for char in text):
            continue  # an unassigned character depends on the library's Unicode version
        parts = [text]
        for pattern in patterns:
            parts = [piece for part in parts for piece in regex.split(f"({pattern})", part) if piece]
        assert [text[begin:end] for _, (begin, end) in library.pre_tokenizer.pre_tokenize_str(text)] == parts


def test_tekken_splits_as_mistral_does() -> None:
    package = pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    values = json.loads((Path(package.__file__).parent / "data" / "tekken_240718.json").read_text(encoding="utf-8"))
    assert PRE_TOKENIZERS["tekken"][0]["pattern"] == {"Regex": values["config"]["pattern"]}


def test_bos_is_added_where_llama_cpp_adds_it(tiny_llama3_json_file: Path, tmp_path: Path) -> None:
    bos = load_tokenizer(tiny_llama3_json_file).bos_id
    for pre, said, adds in [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("tekken", None, True),
    ]:
        more = {} if said is None else {"add_bos_token": said}
        path = write(metadata_of_json(tiny_llama3_json_file, pre, bos_token_id=bos, **more), tmp_path)
        for with_config in (True, False):  # the tokenizer's file states it too, in its post-processor
            if not with_config:
                (tmp_path / "tokenizer_config.json").unlink()
            assert load_tokenizer(path).adds_bos is adds
            assert load_tokenizer(path).encode("a", bos=True)[:1] == ([bos] if adds else load_tokenizer(path).encode("a")[:1])


def test_every_end_is_a_stop_id(tiny_chatml_file: Path, tmp_path: Path) -> None:
    more = {"eos_token_id": 300, "eot_token_id": 301, "eom_token_id": 302}
    tokenizer = load_tokenizer(write(metadata_of_json(tiny_chatml_file, "smollm", **more), tmp_path))
    assert tokenizer.eos_id == 300
    assert tokenizer.stop_ids == {300, 301, 302, 0, 2}  # and <|endoftext|> and <|im_end|>


@pytest.mark.parametrize("source", ["tiny_sentencepiece", "llama2_tokenizer"])
def test_a_sentencepiece_vocabulary(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    expected: Tokenizer = request.getfixturevalue(source)
    if source == "tiny_sentencepiece":
        path = request.getfixturevalue("tiny_sentencepiece_file")
    else:
        path = request.getfixturevalue("shared_data") / "llama2-tokenizer" / "tokenizer.model"
    found = load_tokenizer(write(metadata_of_sentencepiece(path), tmp_path))
    assert type(found) is SentencePieceTokenizer
    assert found.special_tokens == expected.special_tokens
    for name in ("vocab_size", "bos_id", "eos_id", "adds_bos", "stop_ids", "silent_ids"):
        assert getattr(found, name) == getattr(expected, name), name
    for id in range(found.vocab_size):
        assert found.piece(id) == expected.piece(id)
    for text in TEXTS:
        assert found.encode(text, bos=True) == expected.encode(text, bos=True)
        assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))


def test_the_flags_of_a_sentencepiece_vocabulary(tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    def ids(text: str, **more: object) -> list[str]:
        tokenizer = load_tokenizer(write(metadata_of_sentencepiece(tiny_sentencepiece_file, **more), tmp_path))
        return [tokenizer.piece(id) for id in tokenizer.encode(text, bos=True)]

    assert ids("a  b") == ["<s>", "▁a", "▁", "▁b"]
    assert ids("a  b", add_space_prefix=False) == ["<s>", "a", "▁", "▁b"]
    assert ids("a  b", remove_extra_whitespaces=True) == ["<s>", "▁a", "▁b"]
    assert ids("a  b", add_bos_token=False) == ["▁a", "▁", "▁b"]


def test_added_tokens_of_a_sentencepiece_vocabulary(tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    # A ChatML model on LLaMA's vocabulary: new tokens at its end, whose eos is one of them.
    metadata = metadata_of_sentencepiece(tiny_sentencepiece_file)
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<|im_start|>", "<|im_end|>", "<tool>"]
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 3
    metadata["tokenizer.ggml.token_type"] += [3, 4, 4]
    metadata["tokenizer.ggml.eos_token_id"] = n + 1
    tokenizer = load_tokenizer(write(metadata, tmp_path))
    assert tokenizer.eos_id == n + 1
    assert tokenizer.stop_ids >= {n + 1}
    assert tokenizer.special_tokens["<|im_start|>"] == n
    assert n not in tokenizer.encode("<|im_start|>")
    assert n in tokenizer.encode("<|im_start|>", special=True)
    assert n + 2 in tokenizer.encode("a<tool>b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected gpt2 or llama"),
        ({"model": None}, "tokenizer.ggml.model is None, expected gpt2 or llama"),
        ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking', expected one of deepseek-llm, default, falcon3, gpt-2"),
        ({"pre": None}, "tokenizer.ggml.pre is None, expected one of deepseek-llm"),
        ({"pre": ["smollm"]}, "tokenizer.ggml.pre is"),
        ({"tokens": None}, "tokenizer.ggml.tokens is None, expected a list of str"),
        ({"tokens": []}, r"tokenizer.ggml.tokens is \[\], expected a list of str"),
        ({"tokens": ["a", 1]}, "tokenizer.ggml.tokens is .*, expected a list of str"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice, as 0 and 2"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries, expected"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges holds 'a', expected two tokens"),
        ({"merges": ["a \u0120qqqqq"]}, "tokenizer.ggml.merges holds"),
        ({"merges": [1]}, "tokenizer.ggml.merges is"),
        ({"bos_token_id": 10**9, "add_bos_token": True}, "tokenizer.ggml.bos_token_id is 1000000000, expected 0 to"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is 1, expected true or false"),
    ],
)
def test_what_is_damaged_is_refused(tiny_chatml_file: Path, change: dict[str, object], message: str) -> None:
    metadata = metadata_of_json(tiny_chatml_file, **{"pre": "smollm", **change})
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_file(metadata)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries, expected 330"),
        ({"scores": None}, "tokenizer.ggml.scores is None, expected a list of float"),
        ({"token_type": [1] * 330}, "tokenizer.ggml.token_type has 0 unknown tokens, expected one"),
        ({"token_type": [2] + [6] * 329}, "tokenizer.ggml.token_type has 327 bytes, expected 256 or none"),
        ({"eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1, expected 0 to 329"),
        ({"add_space_prefix": "no"}, "tokenizer.ggml.add_space_prefix is 'no', expected true or false"),
    ],
)
def test_what_is_damaged_of_sentencepiece_is_refused(
    tiny_sentencepiece_file: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_file(metadata_of_sentencepiece(tiny_sentencepiece_file, **change))


def test_a_vocabulary_that_sentencepiece_refuses_is_named_on_loading(tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    metadata = metadata_of_sentencepiece(tiny_sentencepiece_file)
    metadata["tokenizer.ggml.tokens"][300] = metadata["tokenizer.ggml.tokens"][301]
    with pytest.raises(TokenizerError, match="found a damaged file"):
        load_tokenizer(write(metadata, tmp_path))
