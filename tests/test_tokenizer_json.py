"""tokenizer.json: what the file leaves unsaid, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from npllama.tokenizer import StreamDecoder, Tokenizer, TokenizerError, load_tokenizer

pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def changed(source: Path, folder: Path, **settings: dict[str, object]) -> Path:
    """Copy the file alone, and write the named JSON files next to it."""
    shutil.copy(source, folder / "tokenizer.json")
    for name, values in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder / "tokenizer.json"


def edited(source: Path, folder: Path, edit) -> Path:
    values = json.loads(source.read_text(encoding="utf-8"))
    edit(values)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder / "tokenizer.json"


def test_bos_and_eos_of_a_chatml_model(tiny_chatml: Tokenizer, tiny_chatml_file: Path, tmp_path: Path) -> None:
    # The file says nothing, tokenizer_config.json next to it says all.
    assert (tiny_chatml.bos_id, tiny_chatml.eos_id, tiny_chatml.adds_bos) == (1, 2, False)
    assert tiny_chatml.stop_ids == {0, 2}
    assert tiny_chatml.encode("", bos=True) == []
    alone = load_tokenizer(changed(tiny_chatml_file, tmp_path))
    assert (alone.bos_id, alone.eos_id, alone.adds_bos) == (None, 0, False)
    assert alone.stop_ids == {0, 2}


def test_bos_and_eos_of_llama3s_kind(tiny_llama3_json: Tokenizer) -> None:
    # No other file: BOS is what its post-processor puts in front, the ends have known names.
    special = tiny_llama3_json.special_tokens
    assert tiny_llama3_json.bos_id == special["<|begin_of_text|>"] == 2000
    assert tiny_llama3_json.adds_bos
    assert tiny_llama3_json.eos_id == special["<|end_of_text|>"]
    assert tiny_llama3_json.stop_ids == {special["<|end_of_text|>"], special["<|eot_id|>"]}


def test_bos_and_eos_of_llama2s_kind(tiny_llama2_json: Tokenizer) -> None:
    assert (tiny_llama2_json.bos_id, tiny_llama2_json.eos_id, tiny_llama2_json.adds_bos) == (1, 2, True)
    assert tiny_llama2_json.stop_ids == {2}
    assert tiny_llama2_json.silent_ids == {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "bos", "adds", "eos", "stop"),
    [
        ({"tokenizer_config": {"add_bos_token": False}}, 2000, False, 2001, {2001, 2004}),
        ({"tokenizer_config": {"add_bos_token": None, "eos_token": "<|eot_id|>"}}, 2000, True, 2004, {2001, 2004}),
        ({"tokenizer_config": {"add_bos_token": True, "bos_token": "<|eot_id|>"}}, 2004, True, 2001, {2001, 2004}),
        ({"tokenizer_config": {"bos_token": "<|eot_id|>"}}, 2000, True, 2001, {2001, 2004}),  # what the post-processor adds
        ({"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}}, 2000, True, 2004, {2001, 2004}),
        ({"generation_config": {"eos_token_id": [7, 2004]}}, 2000, True, 7, {7, 2001, 2004}),
        ({"generation_config": {"eos_token_id": 7}, "tokenizer_config": {"eos_token": "<|eot_id|>"}}, 2000, True, 2004, None),
        ({"tokenizer_config": {"eos_token": "not a token", "eot_token": 5}}, 2000, True, 2001, {2001, 2004}),
        (
            {"generation_config": {"eos_token_id": [10**6, -1, "a", True, 7]}},
            2000,
            True,
            7,
            {7, 2001, 2004},
        ),  # no other is an id
    ],
)
def test_the_files_next_to_it(
    tiny_llama3_json_file: Path, tmp_path: Path, settings: dict, bos: int, adds: bool, eos: int, stop: set[int] | None
) -> None:
    tokenizer = load_tokenizer(changed(tiny_llama3_json_file, tmp_path, **settings))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_id) == (bos, adds, eos)
    assert tokenizer.stop_ids == (stop or {7, 2001, 2004})
    assert tokenizer.encode("a", bos=True) == [bos] * adds + tokenizer.encode("a")


def test_sentencepiece_reads_them_too(tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_sentencepiece_file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 300]}')
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")
    assert tokenizer.stop_ids == {2, 300}


def test_added_tokens_that_are_not_special_are_tokens_wherever_they_are_spelled(tiny_chatml: Tokenizer) -> None:
    repo = tiny_chatml.vocab_size - 1
    assert tiny_chatml.encode("a<repo>b") == [*tiny_chatml.encode("a"), repo, *tiny_chatml.encode("b")]
    assert "<repo>" not in tiny_chatml.special_tokens
    assert tiny_chatml.piece(repo) == "<repo>"


def test_added_tokens_decode_to_their_spelling(tiny_chatml_file: Path, tmp_path: Path) -> None:
    # In byte-level spelling é is the byte 0xE9, but an added token is spelled as it is.
    path = edited(tiny_chatml_file, tmp_path, lambda values: values["added_tokens"][-1].update(content="éé"))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("aéé") == [*tokenizer.encode("a"), tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "éé"


def test_what_chat_formats_are_made_of_is_special_even_if_the_file_forgets_it(tiny_chatml_file: Path, tmp_path: Path) -> None:
    def forget(values: dict) -> None:
        for token in values["added_tokens"]:
            token["special"] = False

    tokenizer = load_tokenizer(edited(tiny_chatml_file, tmp_path, forget))
    assert tokenizer.special_tokens.keys() == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"
    assert 2 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", special=True) == [2]


def test_truncation_and_padding_are_off(tiny_chatml: Tokenizer, tiny_chatml_file: Path, tmp_path: Path) -> None:
    def cut(values: dict) -> None:
        values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        values["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    text = "a text of more than four tokens, and of less than sixty-four"
    assert load_tokenizer(edited(tiny_chatml_file, tmp_path, cut)).encode(text) == tiny_chatml.encode(text)


def test_a_continuation_keeps_its_space(tiny_llama2_json: Tokenizer) -> None:
    (to,) = tiny_llama2_json.encode("to")
    assert tiny_llama2_json.piece(to) == "▁to"
    assert StreamDecoder(tiny_llama2_json).push(to) == "to"
    assert StreamDecoder(tiny_llama2_json, prompt=[1]).push(to) == "to"  # BOS alone: the text begins here
    assert StreamDecoder(tiny_llama2_json, prompt=tiny_llama2_json.encode("she")).push(to) == " to"


def test_the_first_space_stays_where_the_decoder_keeps_it(tiny_llama2_json_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(edited(tiny_llama2_json_file, tmp_path, lambda values: values["decoder"]["decoders"].pop()))
    assert tokenizer.decode(tokenizer.encode("to")) == " to"


def test_metaspace_is_read_as_well(tiny_llama2_json: Tokenizer, tiny_llama2_json_file: Path, tmp_path: Path) -> None:
    def metaspace(values: dict) -> None:
        space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        values |= {"normalizer": None, "pre_tokenizer": space}
        values["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, space]}

    tokenizer = load_tokenizer(edited(tiny_llama2_json_file, tmp_path, metaspace))
    for text in ("She went to the park.", "two  spaces ", "\n🦙"):  # one at the beginning is taken for SentencePiece's own
        assert tokenizer.encode(text) == tiny_llama2_json.encode(text)
        assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_decode_equals_the_librarys(tiny_llama2_json: Tokenizer, tiny_llama2_json_file: Path) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tiny_llama2_json_file))
    for text in ("She went to the park.", "  two  spaces ", "\n🦙<s>", "", " "):
        ids = tiny_llama2_json.encode(text, bos=True, special=True)
        assert tiny_llama2_json.decode(ids) == library.decode(ids)


def drop(*keys: str):
    def edit(values: dict) -> None:
        for key in keys:
            del values[key]

    return edit


def put(key: str, value: object):
    return lambda values: values.update({key: value})


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (drop("model"), "found Cannot instantiate Tokenizer from buffer: Model missing"),
        (put("model", {"type": "Nonsense"}), "found "),
        (put("model", 5), "found "),
        (put("decoder", None), "found the decoder none, expected that of byte-level BPE or of SentencePiece"),
        (put("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}), "found the decoder WordPiece"),
        (put("added_tokens", [{"id": 0}]), "found 'content', expected a tokenizer.json"),
        (put("added_tokens", 5), "found "),
        (put("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}), "found "),
        (lambda values: values["added_tokens"][-1].update(id=10**6), "found id 1000000 for '<repo>', expected"),
        (lambda values: values["added_tokens"][-1].update(id=True), "found "),
    ],
)
def test_a_damaged_file_is_refused(tiny_chatml_file: Path, tmp_path: Path, edit, found: str) -> None:
    path = edited(tiny_chatml_file, tmp_path, edit)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: {found}")
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b'{"a": 1', b"{" * 100_000, b'{"version": "1.0"}', b"{}", b'{"\xff": 1}'])
def test_what_is_no_tokenizer_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: found .*, expected"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("generation_config", [1], "found list, expected a JSON object"),
        ("tokenizer_config", [], "found list, expected a JSON object"),
    ],
)
def test_a_bad_file_next_to_it_is_named(
    tiny_llama3_json_file: Path, tmp_path: Path, name: str, values: object, message: str
) -> None:
    with pytest.raises(TokenizerError, match=rf"{name}\.json: {message}"):
        load_tokenizer(changed(tiny_llama3_json_file, tmp_path, **{name: values}))


def test_a_missing_package_is_named(tiny_chatml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*pip install 'npllama\[convert\]'"):
        load_tokenizer(tiny_chatml_file)


def test_a_pattern_that_takes_too_long_is_one_line(tiny_chatml_file: Path, tmp_path: Path) -> None:
    """Catch the package's panic, which isn't an Exception."""
    path = changed(tiny_chatml_file, tmp_path)
    values = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}, "behavior": "Isolated", "invert": False}
    first = values["pre_tokenizer"]
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *first.get("pretokenizers", [first])]}
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("aA")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: can't split this text: .*limit"):
        tokenizer.encode("a" * 2000)
