"""Check that the split and the merges of the tokenizer's lesson give the real tokenizer's ids."""

from __future__ import annotations

import base64
import random

import pytest

import npllama
from npllama.checkpoint import demo_path
from npllama.cli import main
from npllama.learn import lesson
from npllama.learn.lesson import cell_width
from npllama.learn.tokenizer_lesson import ALTERNATIVES, SENTENCE, alternatives, merges, split, tokenizer_lesson
from npllama.tokenizer import LLAMA3_PATTERN, ids_of, load_tokenizer

from make_corpus import as_unicode, make_corpus

TEXTS = [
    SENTENCE,
    "",
    " ",
    "\n\n  \n\t x",
    "I'LL we'd DON'T 'tis o'clock's",
    "1234567 ٣٤٥ ½ x2",
    "你好，世界！ 今日は🦙🦙 é́ क्षि",
    "<|eot_id|> <|begin_of_text|>",
    "antidisestablishmentarianism Donaudampfschifffahrtsgesellschaft",
    "a" * 50 + " " * 20 + "!" * 20,
]


@pytest.fixture(scope="module")
def demo():
    return npllama.load().tokenizer


def test_the_alternatives_are_the_pattern():
    assert len(alternatives()) == len(ALTERNATIVES) == 7
    assert "|".join(alternatives()) == LLAMA3_PATTERN
    assert alternatives(r"a\|b|[|]|(c|d)|\(|e") == [r"a\|b", "[|]", "(c|d)", r"\(", "e"]


def test_the_sentence_meets_every_alternative():
    parts = split(SENTENCE)
    assert {which for _, which in parts} == set(range(7))
    assert ("'t", 0) in parts
    assert (" llamas", 1) in parts
    assert ("123", 2) in parts
    assert (":\n", 3) in parts
    assert ("\n", 4) in parts
    assert parts[4:7] == [(" ", 5), (" ", 6), ("42", 2)]  # of two spaces before a number the last is no word's


def check_ids(tokenizer, texts) -> int:
    """Split and merge, compare with the real tokenizer, and return the number of parts."""
    ranks, checked = tokenizer.ranks, set()
    for text in texts:
        parts = [part for part, _ in split(text)]
        assert "".join(parts) == text
        assert [id for part in parts for id in ids_of(part.encode(), ranks)] == tokenizer.encode(text), text
        checked.update(parts)
    return len(checked)


def test_the_way_ends_in_the_real_ids(demo):
    assert check_ids(demo, TEXTS + [as_unicode(text) for text in make_corpus(500, seed=3)]) > 500


def test_the_way_ends_in_llama_3_s_ids(llama3_tokenizer):
    assert check_ids(llama3_tokenizer, TEXTS + [as_unicode(text) for text in make_corpus(500, seed=4)]) > 500


def test_merging_alone_gives_a_piece_of_the_vocabulary_its_id(demo):
    """Reach every piece of the demo's vocabulary by merges, lowest rank first, as BPE was trained."""
    ranks = demo.ranks
    for piece in random.Random(0).sample(list(ranks), 500):
        assert merges(piece, ranks)[-1].parts == (piece,)


def test_merges_take_the_lowest_rank_and_the_leftmost():
    ranks = {bytes([b]): b for b in range(256)} | {b"aa": 256, b"ab": 257, b"aab": 258, b"ba": 259}
    rounds = merges(b"aaab", ranks)
    assert [merge.parts for merge in rounds] == [
        (b"a", b"a", b"a", b"b"),
        (b"aa", b"a", b"b"),
        (b"aa", b"ab"),
    ]
    assert rounds[0].pairs[0] == (256, b"aa")
    assert rounds[1].pairs == ((257, b"ab"),)
    assert ids_of(b"aaab", ranks) == [256, 257]
    assert ids_of(b"aab", ranks) == [258]  # whole, though merging would find aa first
    assert merges(b"", ranks)[-1].parts == ()


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_the_lesson_of_any_text(demo, text):
    steps = tokenizer_lesson(demo, text, others=[demo])
    shown = lesson.text(steps)
    assert max(map(cell_width, shown.splitlines())) <= 80, max(shown.splitlines(), key=cell_width)
    assert f"-> {len(demo.encode(text))} ids" in " ".join(shown.split())
    assert lesson.markdown(steps).count("### ") == len(steps)


def test_the_sentence_itself_comes_first(demo):
    (table,) = tokenizer_lesson(demo)[0].tables
    assert table.rows == (('"Don\'t panic:\\n"',), ('"  42 llamas can\'t eat 12345 mangosteens\\n"',))
    long = "word " * 100
    rows = [row[0] for row in tokenizer_lesson(demo, long)[0].tables[0].rows]
    assert "".join(row[1:-1] for row in rows) == long
    assert tokenizer_lesson(demo, "x\n" * 100)[0].tables[0].rows[11:] == (("'x\\n'",), ("…",))
    assert tokenizer_lesson(demo, "")[0].tables[0].rows == (("''",),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SENTENCE, "falls into 16 parts, using all seven alternatives."),
        ("hear me 12", "falls into 4 parts, using 3 of the seven alternatives."),
        ("hear", "falls into 1 part, using 1 of the seven alternatives."),
        ("", "is empty: there is nothing to split."),
    ],
)
def test_how_much_of_the_pattern_a_sentence_uses(demo, text, words):
    step = next(step for step in tokenizer_lesson(demo, text) if step.title == "The pattern at work")
    assert step.sentence.startswith(f"The sentence {words}")


def test_lines_are_the_file_s(demo):
    file = (demo_path() / "tokenizer.model").read_text().splitlines()
    rows = tokenizer_lesson(demo)[1].tables[0].rows
    for line, _, n_bytes, rank in rows:
        assert file[rank] == line
        assert len(base64.b64decode(line.split()[0])) == n_bytes
    assert len(rows) >= 6


def test_the_special_tokens_are_the_tokenizer_s(demo):
    rows = tokenizer_lesson(demo)[-1].tables[0].rows
    assert (2000, "<|begin_of_text|>", "BOS: before a text") in rows
    assert (2009, "<|eot_id|>", "generation ends here") in rows
    for id, name, _ in rows[:-1]:
        assert demo.special_tokens[name] == id
    assert rows[-1][1] == f"{256 - len(rows) + 1} more"


def test_other_kinds_of_tokenizer(tiny_sentencepiece, tiny_chatml, demo):
    for tokenizer in (tiny_sentencepiece, tiny_chatml):
        steps = tokenizer_lesson(tokenizer, "a 12\n", others=[demo])
        ids = tokenizer.encode("a 12\n")
        assert [row[0] for row in steps[1].tables[0].rows] == ids
        assert [row[0] for row in steps[-1].tables[0].rows][: len(ids)] == ids
        assert max(map(cell_width, lesson.text(steps).splitlines())) <= 80
    assert "SentencePiece" in tokenizer_lesson(demo, "x", others=[tiny_sentencepiece])[-1].sentence


def test_llama_3_compared_with_llama_2(llama3_tokenizer, llama2_tokenizer, capsys):
    steps = tokenizer_lesson(llama3_tokenizer, "This is 🦙.cpp", others=[llama2_tokenizer])
    rows = steps[-1].tables[0].rows
    assert [row[2] for row in rows if row[2] != ""] == [910, 338, 29871, 243, 162, 169, 156, 29889, 8223]  # as published
    assert rows[0] == (2028, "'This'", 910, "'▁This'")


def test_the_command(tiny_tiktoken_file, capsys):
    assert main(["walkthrough", "--tokenizer"]) == 0
    shown = capsys.readouterr().out
    assert shown == lesson.text(tokenizer_lesson(npllama.load().tokenizer))
    assert main(["walkthrough", "hello user", "--tokenizer", "-m", str(tiny_tiktoken_file), "--compare", str(demo_path())]) == 0
    expected = tokenizer_lesson(load_tokenizer(tiny_tiktoken_file), "hello user", [npllama.load().tokenizer])
    assert capsys.readouterr().out == lesson.text(expected)
