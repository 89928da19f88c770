"""The tokenizers: known answers, the libraries themselves as judges, and properties that hold for every kind."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama import tokenizer as module
from npllama.checkpoint import demo_path
from npllama.tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_SPECIAL_TOKENS,
    BytePairEncoding,
    SentencePieceTokenizer,
    StreamDecoder,
    TiktokenTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
)

CORPUS = [
    "The best way to attract bees is to plant flowers, isn't it? I'LL see; they're here.",
    "def f(x: int) -> str:\n    if x != 0:\n\t\treturn f'{x:>8}'  # done\r\n\r\n",
    "你好，世界。今天天气很好！",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "안녕하세요 세계, 오늘은 어때요?",
    "Привет, мир! Как дела?",
    "🦙 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1️⃣ 🇮🇹",
    "0 12 345 6789 3.14159 1,000,000 ٣٤٥ ½ Ⅷ",
    "   leading,  inner   and trailing   ",
    "\n\n\n \n\t \n x \u00a0\u2003\u3000y\x00\x1f\x7f",
    "e\u0301 n\u0303 Z̷̡͔a̸l̴g̵o̶ \u202eright to left\u202c \ufeffmark",
    "<s>no</s> <unk> <0x41> <|eot_id|> <|begin_of_text|>",
    "\U0010ffff\ufffd\ud7ff\ue000",
    "",
    " ",
    "\n",
]
KINDS = ["tiny_tiktoken", "tiny_sentencepiece", "llama3_tokenizer", "llama2_tokenizer"]
KINDS += ["tiny_chatml", "tiny_llama3_json", "tiny_llama2_json"]
text_of_any_kind = st.text(max_size=60) | st.text(st.sampled_from("ahelo wor \n\r\t<s/>|é🦙한न\u0301"), max_size=60)


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def base64_lines(pieces: list[bytes]) -> list[bytes]:
    return [b"%s %d" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]


BYTES = base64_lines([bytes([byte]) for byte in range(256)])


# Known answers: the issue, shared/data/README.md, and the published ids of the special tokens.


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello world!", [15339, 1917, 0]),
        ("This is a test sentence.", [2028, 374, 264, 1296, 11914, 13]),
        (
            "the answer to the ultimate question of life, the universe, and everything is ",
            [1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220],
        ),
        # From Meta's own code (llama-models 0.3.0): every branch of the split pattern, other scripts, emoji with joiners.
        (
            "WE'LL pay 1234567€, it's  fine!\n\n  x\t?\r\n ",
            [12739, 6, 4178, 2343, 220, 4513, 10961, 22, 15406, 11, 433, 596, 220, 7060, 2268, 220, 865, 197, 46449, 220],
        ),
        ("你好，世界。", [57668, 53901, 3922, 102616, 1811]),
        ("🦙 👩‍👧", [9468, 99, 247, 62904, 102, 102470, 9468, 239, 100]),
        ("नमस्ते", [61196, 88344, 79468, 100365, 35470]),
        ("e\u0301", [68, 54939]),
    ],
)
def test_llama3_known_ids(llama3_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert llama3_tokenizer.encode(text) == ids
    assert llama3_tokenizer.encode(text, bos=True) == [128000, *ids]
    assert llama3_tokenizer.decode(ids) == text


def test_llama3_special_ids(llama3_tokenizer: Tokenizer) -> None:
    assert llama3_tokenizer.vocab_size == 128256
    assert (llama3_tokenizer.bos_id, llama3_tokenizer.eos_id) == (128000, 128001)
    assert llama3_tokenizer.stop_ids == {128001, 128008, 128009}
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|image|>", "<|reserved_special_token_2|>"]
    assert [llama3_tokenizer.special_tokens[name] for name in names] == [128006, 128007, 128010, 128011, 128012]
    assert llama3_tokenizer.special_tokens["<|reserved_special_token_245|>"] == 128255
    assert len(llama3_tokenizer.special_tokens) == 256
    names = ["reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id", "step_id"]
    assert [llama3_tokenizer.special_tokens[f"<|{name}|>"] for name in names] == [128002, 128003, 128004, 128005]


def test_llama3_pattern_splits_as_published() -> None:
    regex = pytest.importorskip("regex", reason="regex is not installed")  # tiktoken itself depends on it
    text = "WE'LL pay 1234567€, it's  fine!\n\n  x\t?\r\n "
    parts = [
        "WE",
        "'LL",
        " pay",
        " ",
        "123",
        "456",
        "7",
        "€,",
        " it",
        "'s",
        " ",
        " fine",
        "!\n\n",
        " ",
        " x",
        "\t",
        "?\r\n",
        " ",
    ]
    assert regex.findall(LLAMA3_PATTERN, text) == parts


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("ing", [2348]),
        ("working", [1985]),
        ("wonking", [2113, 9292]),
        ("flexing", [8525, 292]),
        ("The best way to attract bees", [450, 1900, 982, 304, 13978, 367, 267]),
        ("This is 🦙.cpp", [910, 338, 29871, 243, 162, 169, 156, 29889, 8223]),
    ],
)
def test_llama2_known_ids(llama2_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert llama2_tokenizer.encode(text, bos=True) == [1, *ids]
    assert llama2_tokenizer.decode([1, *ids, 2]) == text


def test_llama2_special_ids(llama2_tokenizer: Tokenizer) -> None:
    assert llama2_tokenizer.vocab_size == 32000
    assert (llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (1, 2)
    assert llama2_tokenizer.stop_ids == {2}
    assert llama2_tokenizer.special_tokens == {"<s>": 1, "</s>": 2}


# The libraries themselves as judges.


def test_ids_equal_tiktokens_own(llama3_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache
    ranks = load_tiktoken_bpe(os.environ["NPLLAMA_LLAMA3_TOKENIZER"])
    special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    judge = tiktoken.Encoding("judge", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in [*CORPUS, "\n".join(CORPUS)]:
        assert llama3_tokenizer.encode(text) == judge.encode_ordinary(text)
        assert llama3_tokenizer.encode(text, special=True) == judge.encode(text, allowed_special="all")
    ids = judge.encode("\n".join(CORPUS), allowed_special="all")
    assert llama3_tokenizer.decode(ids) == judge.decode(ids)
    assert llama3_tokenizer.decode_bytes(ids[:-1]) == judge.decode_bytes(ids[:-1])


def sentencepiece_judge(path: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_ids_equal_sentencepieces_own(llama2_tokenizer: Tokenizer, shared_data: Path) -> None:
    judge = sentencepiece_judge(shared_data / "llama2-tokenizer" / "tokenizer.model")
    for text in [*CORPUS, "\n".join(CORPUS), "a ▁ b"]:
        ids = judge.encode(text)
        assert llama2_tokenizer.encode(text) == ids
        assert llama2_tokenizer.decode(ids) == judge.decode(ids)
        assert [llama2_tokenizer.piece(id) for id in ids] == [judge.id_to_piece(id) for id in ids]


@settings(deadline=None)
@given(st.lists(st.integers(0, 329), max_size=8))
def test_decode_equals_sentencepieces_own(tiny_sentencepiece: Tokenizer, tiny_sentencepiece_file: Path, ids: list[int]) -> None:
    # Control pieces, leading spaces, <unk> and byte pieces in any order. Two differences are ours: bytes that are no UTF-8 are
    # U+FFFD to both, but SentencePiece counts one for each byte; and a control piece inside a character doesn't break it.
    visible = [id for id in ids if id not in tiny_sentencepiece.silent_ids]
    expected = sentencepiece_judge(tiny_sentencepiece_file).decode(ids[:1] + [id for id in ids[1:] if id in visible])
    assert tiny_sentencepiece.decode(ids).replace("\ufffd", "") == expected.replace("\ufffd", "")


# Properties of every kind.


@settings(deadline=None)
@given(text=text_of_any_kind)
def test_round_trip_is_byte_exact(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.silent_ids:
        text = text.replace("▁", "_")  # SentencePiece and what is made of it: test_the_spelling_of_a_space_is_the_exception
    for bos in (False, True):
        ids = tokenizer.encode(text, bos=bos)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        body = ids[bos and tokenizer.adds_bos :]
        assert tokenizer.decode(body) == text
        assert tokenizer.decode_bytes(body) == text.encode()


def test_round_trip_of_the_corpus(tokenizer: Tokenizer) -> None:
    for text in [*CORPUS, "\n".join(CORPUS)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_spelling_of_a_space_is_the_exception(tiny_sentencepiece: Tokenizer, tiny_tiktoken: Tokenizer) -> None:
    # To SentencePiece ▁ and a space are one character: the published ids are kept, the difference is lost.
    assert tiny_sentencepiece.encode("a▁b") == tiny_sentencepiece.encode("a b")
    assert tiny_tiktoken.decode(tiny_tiktoken.encode("a▁b")) == "a▁b"


@settings(deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    some_id = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 300)  # the first hold most of the single bytes
    ids = data.draw(st.lists(some_id, max_size=20))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    # Cut anywhere into a prompt and its continuation, the text is the same.
    cut = data.draw(st.integers(0, len(ids)))
    decoder = StreamDecoder(tokenizer, prompt=ids[:cut])
    continued = [decoder.push(id) for id in ids[cut:]]
    assert continued == pieces[cut:]


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_streaming_never_prints_a_broken_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "") + "🦙한é"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert decoder.flush() == ""


def test_a_stream_that_ends_inside_a_character_says_so(tiny_tiktoken: Tokenizer) -> None:
    decoder = StreamDecoder(tiny_tiktoken)
    assert [decoder.push(0xE2), decoder.push(0x82), decoder.flush()] == ["", "", "\ufffd"]
    assert tiny_tiktoken.decode([0xE2, 0x82]) == "\ufffd"


def test_a_character_begun_in_the_prompt_is_finished_by_its_continuation(tiny_tiktoken: Tokenizer) -> None:
    first, last = tiny_tiktoken.encode("🦙")
    assert StreamDecoder(tiny_tiktoken, prompt=[first]).push(last) == "🦙"


def test_a_continuation_keeps_its_space(llama2_tokenizer: Tokenizer) -> None:
    (to,) = llama2_tokenizer.encode("to")
    assert llama2_tokenizer.piece(to) == "▁to"
    assert StreamDecoder(llama2_tokenizer).push(to) == "to"
    assert StreamDecoder(llama2_tokenizer, prompt=[1]).push(to) == "to"  # BOS alone: the text begins here
    assert StreamDecoder(llama2_tokenizer, prompt=llama2_tokenizer.encode("way", bos=True)).push(to) == " to"


def test_sentencepiece_drops_one_space_at_the_very_beginning(tiny_sentencepiece: Tokenizer) -> None:
    (space,) = [id for id in range(tiny_sentencepiece.vocab_size) if tiny_sentencepiece.piece(id) == "▁"]
    assert tiny_sentencepiece.decode([space]) == ""
    assert tiny_sentencepiece.decode([1, space, space, 2, space]) == "  "


def test_bos_is_added_once(tokenizer: Tokenizer) -> None:
    if not tokenizer.adds_bos:
        assert tokenizer.encode("hello", bos=True) == tokenizer.encode("hello")
        return
    name = next(name for name, id in tokenizer.special_tokens.items() if id == tokenizer.bos_id)
    bos, body = tokenizer.bos_id, tokenizer.encode("hello")
    assert tokenizer.encode("hello", bos=True) == [bos, *body]
    assert tokenizer.encode("", bos=True) == [bos]
    assert tokenizer.encode(name + "hello", special=True) == [bos, *body]
    assert tokenizer.encode(name + "hello", bos=True, special=True) == [bos, *body]
    assert tokenizer.encode(name + "hello", bos=True).count(bos) == 1


def test_special_tokens_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    for name, id in list(tokenizer.special_tokens.items())[:12]:
        text = f"a{name}b"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, special=True) == [*tokenizer.encode("a"), id, *tokenizer.encode("b")]
        assert tokenizer.piece(id) == name


def test_special_tokens_decode_as_in_each_library(tiny_tiktoken: Tokenizer, tiny_sentencepiece: Tokenizer) -> None:
    assert tiny_tiktoken.decode([tiny_tiktoken.bos_id, *tiny_tiktoken.encode("hi")]) == "<|begin_of_text|>hi"
    assert tiny_sentencepiece.decode([1, *tiny_sentencepiece.encode("hi"), 2]) == "hi"
    assert tiny_sentencepiece.decode([0]) == " ⁇ "


def test_stop_ids(tiny_tiktoken: Tokenizer, tiny_sentencepiece: Tokenizer) -> None:
    names = {name for name, id in tiny_tiktoken.special_tokens.items() if id in tiny_tiktoken.stop_ids}
    assert names == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert tiny_tiktoken.eos_id == tiny_tiktoken.special_tokens["<|end_of_text|>"]
    assert tiny_sentencepiece.stop_ids == {tiny_sentencepiece.special_tokens["</s>"]}


@pytest.mark.parametrize(
    ("text", "same_as"),
    [("\ud800", "\ufffd"), ("a\udc80b", "a\ufffdb"), ("\ud83e\udd99", "🦙"), ("\udd99\ud83e", "\ufffd\ufffd")],
)
def test_halves_of_surrogate_pairs(tokenizer: Tokenizer, text: str, same_as: str) -> None:
    assert tokenizer.encode(text) == tokenizer.encode(same_as)


@pytest.mark.parametrize("bad", [-1, 10**6, 10**30])
def test_an_id_outside_the_vocabulary_is_named(tokenizer: Tokenizer, bad: int) -> None:
    message = rf"token id {bad} is outside the tokenizer's vocabulary: expected 0 to {tokenizer.vocab_size - 1}"
    for take in (
        lambda: tokenizer.decode([1, bad]),
        lambda: tokenizer.decode_bytes([bad]),
        lambda: tokenizer.piece(bad),
        lambda: StreamDecoder(tokenizer).push(bad),
    ):
        with pytest.raises(ValueError, match=message):
            take()
    with pytest.raises(ValueError, match="outside"):
        tokenizer.piece(tokenizer.vocab_size)
    tokenizer.piece(tokenizer.vocab_size - 1)


def test_ids_may_be_numpys(tokenizer: Tokenizer) -> None:
    ids = np.array(tokenizer.encode("hello wor"), dtype=np.int64)
    assert tokenizer.decode(ids) == "hello wor"
    assert tokenizer.piece(ids[0]) == tokenizer.piece(int(ids[0]))


def test_every_piece_is_one_visible_line(tokenizer: Tokenizer) -> None:
    for id in range(tokenizer.vocab_size):
        assert tokenizer.piece(id)
        assert tokenizer.piece(id).isprintable() or tokenizer.silent_ids


def test_pieces_of_llama3s_kind(tiny_tiktoken: Tokenizer) -> None:
    shown = [tiny_tiktoken.piece(id) for id in tiny_tiktoken.encode("hello wor🦙\n\n\\é")]
    assert shown == ["hello", " wor", "<0xF0><0x9F>", "<0xA6><0x99>", r"\n\n", r"\\", "é"]


# Meta's limits for long runs.


def cut_as_meta_does(text: str, max_chars: int, max_run: int) -> list[str]:
    """Cut by definition: count the consecutive characters of the same sort (whitespace or not)."""
    parts = []
    for begin in range(0, len(text), max_chars):
        part, run, before = "", 0, None
        for char in text[begin : begin + max_chars]:
            run = run + 1 if char.isspace() == before else 1
            before = char.isspace()
            if run > max_run:
                parts.append(part)
                part, run = "", 1
            part += char
        parts.append(part)
    return parts


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("ab🦙  \n\x1c\u3000\u200b"), max_size=80), chars=st.integers(1, 40), run=st.integers(1, 12))
def test_long_texts_are_cut_as_meta_does(text: str, chars: int, run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TIKTOKEN_MAX_ENCODE_CHARS", chars)
        patch.setattr(module, "MAX_NO_WHITESPACES_CHARS", run)
        assert list(module.split_long(text)) == cut_as_meta_does(text, chars, run)


@pytest.mark.parametrize(
    "text", ["a" * 100_000, " " * 60_000, "ab " * 150_000, "é" * 25_001 + "\n" * 25_001, ("a" * 24_999 + " ") * 20]
)
def test_long_runs(tokenizer: Tokenizer, text: str) -> None:
    assert list(module.split_long(text)) == cut_as_meta_does(text, 400_000, 25_000)
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 20  # under a second; quadratic time takes minutes
    assert tokenizer.decode(ids) == text


def test_the_cuts_show_in_the_ids(llama3_tokenizer: Tokenizer) -> None:
    eight = llama3_tokenizer.encode("a" * 8)
    assert llama3_tokenizer.encode("a" * 100_000) == eight * 12_500
    # Within the limit a run is one text; past it the rest is another text, so 25,001 are not the ids of 25,001 uncut.
    long = llama3_tokenizer.encode("a" * 24_999)
    assert llama3_tokenizer.encode("a" * 49_999) == llama3_tokenizer.encode("a" * 25_000) + long
    # A special token across a cut is text, as with Meta's code.
    text = "a" * 24_995 + "<|eot_id|>"
    eot = llama3_tokenizer.special_tokens["<|eot_id|>"]
    assert eot not in llama3_tokenizer.encode(text, special=True)
    assert eot in llama3_tokenizer.encode(text[10:], special=True)


# Loading.


def test_the_kind_is_told_from_the_content(tiny_tiktoken_file: Path, tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    for source, kind in ((tiny_tiktoken_file, TiktokenTokenizer), (tiny_sentencepiece_file, SentencePieceTokenizer)):
        for name in ("tokenizer.model", "tokenizer.json", "x.tiktoken"):
            (tmp_path / name).write_bytes(source.read_bytes())
            assert type(load_tokenizer(tmp_path / name)) is kind
            assert type(load_tokenizer(str(tmp_path / name))) is kind


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b" \n\n \n", "only whitespace"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n<html><head>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2183982\n", "a git-lfs pointer"),
        (b"PK\x03\x04\x14\x00", "a file that begins b'PK"),
        (b"IQ==", "a file that begins b'IQ=='"),
        (b"\n\x0e\n\x05<un", "a damaged file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="expected") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert f"found {found}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none\.model is missing$"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(TokenizerError, match=r"is a folder, expected a file$"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_model(tiny_sentencepiece_file: Path, tmp_path: Path) -> None:
    data = tiny_sentencepiece_file.read_bytes()
    path = tmp_path / "tokenizer.model"
    for size in (4, 100, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: found"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (257, b"aGU= 255", "line 257: found rank 255, expected 256"),
        (257, b"aGU= 257", "line 257: found rank 257, expected 256"),
        (257, b"aGU= x", "line 257: found rank x, expected 256"),
        (257, b"aGU= +256", "line 257: found rank"),
        (257, b"aGU=", "line 257: found b'aGU=', expected base64"),
        (257, b"aGU= 256 1", "line 257: found"),
        (257, b"a?U= 256", "line 257: found"),
        (257, b"aGU 256", "line 257: found"),
        (257, b"IQ== 256", "line 257: found b'!' again"),
        (34, b"aGU= 33", "found no piece for 1 single bytes (0x21 first)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: int, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join([*BYTES[: line - 1], content, *BYTES[line:]]))
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_blank_lines_and_line_breaks_do_not_matter(tmp_path: Path, tiny_tiktoken_file: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_tiktoken_file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert load_tokenizer(path).vocab_size == load_tokenizer(tiny_tiktoken_file).vocab_size == 256 + 20 + 256


def test_a_file_changed_in_place_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for merge in (b"he", b"lo"):
        path.write_bytes(b"\n".join([*BYTES, *base64_lines([*[b""] * 256, merge])[256:]]))
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(merge.decode()) == [256]
        assert tokenizer.decode([256]) == merge.decode()


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_a_planted_cache_file_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    from tiktoken.load import load_tiktoken_bpe

    path, cache = tmp_path / "tokenizer.model", tmp_path / "cache"
    path.write_bytes(b"\n".join(BYTES))
    cache.mkdir()
    (cache / hashlib.sha1(str(path).encode()).hexdigest()).write_bytes(b"\n".join([*BYTES, b"aGU= 256"]))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(cache))
    assert len(load_tiktoken_bpe(str(path))) == 257  # tiktoken's own loader reads the planted file
    assert load_tokenizer(path).vocab_size == 256 + 256
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_remote_paths_are_opened_through_blobfile(
    tiny_tiktoken_file: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    blobfile = pytest.importorskip("blobfile", reason="blobfile is not installed")
    real, prefix = blobfile.BlobFile, f"{scheme}://bucket"
    monkeypatch.setattr(
        blobfile, "BlobFile", lambda path, mode: real(path.replace(prefix, str(tiny_tiktoken_file.parent)), mode)
    )
    tokenizer = load_tokenizer(f"{prefix}/tokenizer.model")
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with pytest.raises(TokenizerError, match=rf"{prefix}/none\.model: can't be read"):
        load_tokenizer(f"{prefix}/none.model")


def test_without_tiktoken_the_ids_are_the_same(tiny_tiktoken_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    pytest.importorskip("regex", reason="regex is not installed")
    for path in (tiny_tiktoken_file, demo_path() / "tokenizer.model"):
        theirs, ours = load_tokenizer(path), load_tokenizer(path)
        assert type(theirs.encoding).__module__.split(".")[0] == "tiktoken"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "tiktoken", None)
            assert type(ours.encoding) is BytePairEncoding
        for text in [*CORPUS, "\n".join(CORPUS), "a" * 30_000, "ab" * 20_000, "<|eot_id|>" * 3]:
            for special in (False, True):
                ids = ours.encode(text, special=special)
                assert ids == theirs.encode(text, special=special), repr(text[:80])
            assert ours.decode_bytes(ids) == theirs.encoding.decode_bytes(ids)


def test_known_ids_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect tiktoken's ids where there is no tiktoken to compare with."""
    pytest.importorskip("regex", reason="regex is not installed")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = load_tokenizer(demo_path() / "tokenizer.model")
    assert tokenizer.encode("KING: Don't\n  42 llamas<|eot_id|>", bos=True, special=True) == [
        2000,
        450,
        25,
        831,
        276,
        674,
        198,
        220,
        220,
        19,
        17,
        220,
        274,
        387,
        361,
        2009,
    ]


def test_without_a_package_for_text_ids_still_have_theirs(tiny_tiktoken_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_tiktoken_file)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setitem(sys.modules, "regex", None)
    assert tokenizer.decode([104, 105]) == "hi"
    assert tokenizer.piece(tokenizer.eos_id) == "<|end_of_text|>"
    expected = r"tokenizer\.model: text needs .*tiktoken.*regex: pip install regex, or apt install python3-regex$"
    with pytest.raises(TokenizerError, match=expected):
        tokenizer.encode("hi")


def test_a_missing_package_is_named(tiny_sentencepiece_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blobfile", None)
    with pytest.raises(TokenizerError, match=r"gs://b/t\.model: .*pip install 'npllama\[convert\]'"):
        load_tokenizer("gs://b/t.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"pip install 'npllama\[convert\]'"):
        load_tokenizer(tiny_sentencepiece_file)


def test_libraries_are_imported_only_when_needed(tiny_tiktoken_file: Path) -> None:
    code = (
        "import sys, npllama.tokenizer, npllama.chat\n"
        "heavy = {'tiktoken', 'sentencepiece', 'blobfile'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "tokenizer = npllama.tokenizer.load_tokenizer(sys.argv[1])\n"
        "tokenizer.decode([72]), tokenizer.piece(72)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "tokenizer.encode('text')\n"
        "assert heavy & set(sys.modules) <= {'tiktoken'}, heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_tiktoken_file)], check=True)
