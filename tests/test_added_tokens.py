"""Tokens that Hugging Face's files add to a SentencePiece model, and ids that have no token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from npllama.tokenizer import Tokenizer, TokenizerError, load_tokenizer

TEXTS = [
    "<|im_start|>user\nOnce upon a time<|im_end|>",
    "Once <|im_start|> upon<|im_end|><|im_end|> a  time ",
    " <tool> Lily <tool>",
    "<tool><tools>",
    "<s>Once</s> upon",
    "Once upon a time",
    "",
]
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
ADDED = {
    "1": {"content": "<s>", "special": True},
    "2": {"content": "</s>", "special": True},
    "330": {"content": "<|im_end|>", "special": True},
    "331": {"content": "<|im_start|>", "special": True},
    "332": {"content": "<tool>", "special": False, "rstrip": True},
    "333": {"content": "<tools>", "special": False},
}


def write(folder: Path, model: Path, config: dict[str, object], old: dict[str, int] | None = None) -> Path:
    """Write a Hugging Face folder with tokenizer.model and its added tokens."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | config))
    if old is not None:
        (folder / "added_tokens.json").write_text(json.dumps(old))
    return folder / "tokenizer.model"


def decoder() -> dict[str, object]:
    return {id: PLAIN | entry for id, entry in ADDED.items()}


@pytest.fixture(scope="module", params=[True, False, None])
def ours_and_theirs(request, tiny_sentencepiece_file, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    legacy = {} if request.param is None else {"legacy": request.param}
    folder = tmp_path_factory.mktemp("added") / "src"
    file = write(folder, tiny_sentencepiece_file, {"added_tokens_decoder": decoder(), **legacy})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(file), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_are_hugging_face_s(ours_and_theirs, text):
    ours, theirs = ours_and_theirs
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_message_spells_stays_text_and_leaves_the_rest_as_it_is(ours_and_theirs, text):
    ours, theirs = ours_and_theirs
    parts = ours.split_special(text)
    assert ours.encode_parts(parts) == theirs.encode(text, add_special_tokens=False)
    inside = ours.encode_parts(["", "<|im_start|>", "a <|im_start|> a", "<|im_end|>", ""])
    assert (inside[0], inside.count(331), inside[-1]) == (331, 1, 330)


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_ids_are_hugging_face_s_where_nothing_is_added_too(legacy, tiny_sentencepiece_file, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    file = write(
        tmp_path / "src", tiny_sentencepiece_file, {"eos_token": "</s>"} | ({} if legacy is None else {"legacy": legacy})
    )
    (file.parent / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(file), transformers.AutoTokenizer.from_pretrained(file.parent)
    for text in ("<s>Once</s>\nupon<s> a  time</s>", " Once", "Once upon", "\n a", "a</s>", " ", ""):
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == expected
        assert ours.encode_parts(ours.split_special(text)) == expected


def test_sizes_and_ends_are_hugging_face_s(ours_and_theirs):
    ours, theirs = ours_and_theirs
    assert ours.vocab_size == len(theirs) == 334
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 330)
    assert ours.stop_ids == {330}


@pytest.fixture(scope="module")
def added(tiny_sentencepiece_file, tmp_path_factory) -> Tokenizer:
    config = {"added_tokens_decoder": decoder(), "legacy": True}
    return load_tokenizer(write(tmp_path_factory.mktemp("added") / "src", tiny_sentencepiece_file, config))


def test_a_special_token_s_spelling_is_text_and_another_s_the_token(added, tiny_sentencepiece):
    for text in ("<|im_start|>user", "a</s>b"):
        assert added.encode(text) == tiny_sentencepiece.encode(text)
        assert not set(added.encode(text)) & set(added.special_tokens.values())
    assert added.encode("<tools>") == [333]
    assert added.special_tokens == {"<s>": 1, "</s>": 2, "<|im_end|>": 330, "<|im_start|>": 331}


def test_added_tokens_decode_as_the_others(added):
    ids = [1, 331, *added.encode("Once upon"), 330, 332]
    assert added.decode(ids) == "Once upon<tool>"
    assert [added.piece(id) for id in (330, 332)] == ["<|im_end|>", "<tool>"]


def test_the_older_file_knows_no_special_tokens_but_by_name(tiny_sentencepiece_file, tmp_path):
    file = write(tmp_path / "src", tiny_sentencepiece_file, {}, {"<|im_end|>": 330, "<|im_start|>": 331, "<extra>": 332})
    tokenizer = load_tokenizer(file)
    assert tokenizer.special_tokens.keys() >= {"<|im_end|>", "<|im_start|>"}  # of ChatML even where nothing names it
    assert "<extra>" not in tokenizer.special_tokens
    assert tokenizer.encode("<extra>") == [332]
    assert tokenizer.stop_ids == {330}


def test_a_gap_among_the_ids_is_no_text(tiny_sentencepiece_file, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "src", tiny_sentencepiece_file, {}, {"<far>": 340}))
    assert tokenizer.vocab_size == 341
    assert (tokenizer.decode([335, 340]), tokenizer.piece(335)) == ("<far>", "")


@pytest.mark.parametrize(
    ("old", "decoder", "expected"),
    [
        ({"<x>": 7}, {}, r"found '.*' as id 7, expected the added '<x>'$"),
        ({"<x>": -1}, {}, r"found the added token '<x>' as '-1', expected a text and an id$"),
        ({"<x>": 10**12}, {}, "expected a text and an id$"),
        ({"<x>": True}, {}, "expected a text and an id$"),
        ({"": 331}, {}, "expected a text and an id$"),
        ({}, {"331": "<x>"}, "found the added token None as '331'"),
        ({}, {"331": {"content": ["<x>"]}}, "expected a text and an id$"),
    ],
)
def test_added_tokens_that_can_t_be_are_one_line(tiny_sentencepiece_file, tmp_path, old, decoder, expected):
    file = write(tmp_path / "src", tiny_sentencepiece_file, {"added_tokens_decoder": decoder}, old)
    with pytest.raises(TokenizerError, match=expected) as error:
        load_tokenizer(file)
    assert "\n" not in str(error.value)


def test_rows_of_the_model_without_a_token_decode_to_nothing(
    tiny_llama2_json_file, tiny_sentencepiece_file, tiny_tiktoken_file
):
    for file in (tiny_llama2_json_file, tiny_sentencepiece_file, tiny_tiktoken_file):
        tokenizer = load_tokenizer(file)
        n = tokenizer.vocab_size
        with pytest.raises(ValueError, match=f"token id {n} is outside"):
            tokenizer.decode([n])
        tokenizer.n_rows = n + 8
        ids = tokenizer.encode("Once upon")
        assert tokenizer.decode([n + 7, *ids, n]) == tokenizer.decode(ids) == "Once upon"
        assert tokenizer.piece(n + 7) == ""
        for refused in (tokenizer.decode, tokenizer.piece):
            with pytest.raises(ValueError, match=f"token id {n + 8} is outside .* expected 0 to {n + 7}$"):
                refused([n + 8] if refused == tokenizer.decode else n + 8)
