"""Explain tokenization step by step: the file's lines, the split, the merges, special tokens, a comparison of tokenizers.

The ids are the tokenizer's own. Its library doesn't expose the steps in between, so split() and merges() recompute them from
the pattern and the ranks; a test checks that they give the same ids.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..tokenizer import (
    LLAMA3_PATTERN,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    ids_of,
    import_regex,
    load_tokenizer,
    merge_rounds,
)
from .lesson import Cell, Source, Step, Table, cell_width, label

# Its parts together use all seven alternatives of the pattern.
SENTENCE = "Don't panic:\n  42 llamas can't eat 12345 mangosteens\n"

# What each alternative of LLAMA3_PATTERN matches, in order.
ALTERNATIVES = (
    "the end of a contraction",
    "a word with a leading character",
    "up to three digits",
    "punctuation",
    "line breaks",
    "spaces, except the last",
    "spaces",
)
CHAIN_CELLS, PAIRS_CELLS = 36, 33  # terminal columns for a word's parts, and for its pairs
SENTENCE_CELLS, SENTENCE_LINES = 64, 12  # terminal columns and lines for the sentence itself
SPECIAL_SHOWN = 12
TOKENS_SHOWN = 40
IDS_CELLS = 24


def alternatives(pattern: str = LLAMA3_PATTERN) -> list[str]:
    """Split a regular expression into its alternatives, at each `|` outside of brackets."""
    found, depth, escaped = [""], 0, False
    for c in pattern:
        if not escaped:
            depth += (c in "([") - (c in ")]")
        if c == "|" and depth == 0 and not escaped:
            found.append("")
        else:
            found[-1] += c
        escaped = c == "\\" and not escaped
    return found


def split(text: str) -> list[tuple[str, int]]:
    """Split a text into parts, before merging; each comes with the index of the alternative that matched it."""
    pattern = import_regex("the split pattern").compile("|".join(f"({alternative})" for alternative in alternatives()))
    return [(match[0], match.lastindex - 1) for match in pattern.finditer(text)]


@dataclass(frozen=True)
class Merge:
    """One round of byte-pair encoding: the parts, and the adjacent pairs that form a piece, lowest rank first."""

    parts: tuple[bytes, ...]
    pairs: tuple[tuple[int, bytes], ...]  # rank, piece; the first is merged next


def merges(piece: bytes, ranks: Mapping[bytes, int]) -> list[Merge]:
    """Merge a piece's bytes, round by round; the last round's parts are its tokens."""
    rounds = []
    for merged in merge_rounds(piece, ranks):
        parts = [part for part in merged if part is not None]
        pairs = [
            (ranks[joined], i, joined) for i, joined in enumerate(map(b"".join, itertools.pairwise(parts))) if joined in ranks
        ]
        rounds.append(Merge(tuple(parts), tuple((rank, joined) for rank, _, joined in sorted(pairs))))
    return rounds


# ------------------------------------------------------------------------------------------------------------------ the steps


def tokenizer_lesson(tokenizer: Tokenizer, sentence: str = SENTENCE, others: Sequence[Tokenizer] = ()) -> list[Step]:
    """Explain how a sentence is encoded; `others` are tokenizers to compare with.

    A tiktoken tokenizer (Llama 3's) has a file, a split and merges to show; other kinds show only ids, special tokens and the
    comparison.
    """
    steps = [_sentence(tokenizer, sentence)]
    if isinstance(tokenizer, TiktokenTokenizer):
        ranks = tokenizer.ranks
        steps += [_lines(tokenizer, sentence), _pattern(), _split(tokenizer, sentence, ranks)]
        if word := _word(sentence, ranks):
            steps.append(_merges(tokenizer, word, ranks))
    else:
        steps.append(_pieces(tokenizer, sentence))
    steps.append(_special(tokenizer))
    if others:
        steps.append(_comparison([tokenizer, *others], sentence))
    return steps


def _sentence(tokenizer: Tokenizer, sentence: str) -> Step:
    lines = _folded(_as_text(sentence))
    rows = [(label(_visible(line), SENTENCE_CELLS + 2),) for line in lines[:SENTENCE_LINES]]
    if len(lines) > SENTENCE_LINES:
        rows.append(("…",))
    return Step(
        "The sentence",
        r"A tokenizer reads characters; spaces and line breaks (\n) count too.",
        shape=f"{len(sentence)} characters  ->  {len(tokenizer.encode(sentence))} ids",
        tables=(Table(("",), tuple(rows)),),
        sources=(Source.of(Tokenizer.encode),),
    )


def _lines(tokenizer: TiktokenTokenizer, sentence: str) -> Step:
    n = tokenizer.vocab_size - len(tokenizer.special_tokens)
    met = sorted(set(tokenizer.encode(sentence)), reverse=True)[:3]
    rows = []
    for id in [*range(3), *sorted({*met, n - 1} - set(range(3)))]:
        data = tokenizer.token_bytes(id, False)
        rows.append((f"{base64.b64encode(data).decode()} {id}", label(tokenizer.piece(id)), len(data), id))
    return Step(
        "A line of tokenizer.model",
        f"The file has {n:,} lines: a piece in base64, a space and its rank. The pieces are bytes, not characters, and all 256 "
        "single bytes are among them, so that any text can be encoded. The rank is the token's id and also its priority: in "
        "training, pieces were added one at a time, the most frequent pair first, and merging goes in the same order.",
        formula="line = base64(piece) + ' ' + rank",
        shape=f"{n:,} pieces + {len(tokenizer.special_tokens)} special tokens = {tokenizer.vocab_size:,} ids",
        tables=(Table(("line", "piece", "bytes", "rank = id"), tuple(rows)),),
        sources=(Source.of(load_tokenizer), Source.of(TiktokenTokenizer.__init__)),
    )


def _pattern() -> Step:
    rows = tuple(
        (i, name, pattern.replace(" ", "␣"))
        for i, (name, pattern) in enumerate(zip(ALTERNATIVES, alternatives(), strict=True), 1)
    )
    return Step(
        "The split pattern",
        "Before merging, a regular expression splits the text, so that no token crosses a word boundary. It has seven "
        "alternatives; at each position the first one that matches gives the next part. A word includes one character before "
        "it, usually a space; the last of several spaces goes to the word after them.",
        formula="pattern = 1 | 2 | 3 | 4 | 5 | 6 | 7",
        tables=(Table(("", "matches", "alternative (␣ is a space)"), rows),),
        sources=(Source.of(TiktokenTokenizer.__init__),),
    )


def _split(tokenizer: TiktokenTokenizer, sentence: str, ranks: Mapping[bytes, int]) -> Step:
    rows: list[tuple[Cell, ...]] = []
    parts = split(_as_text(sentence))
    for part, which in parts[:TOKENS_SHOWN]:
        ids = ids_of(part.encode(), ranks)
        rows.append((label(_visible(part)), which + 1, ALTERNATIVES[which], _fitting(map(str, ids), IDS_CELLS)))
    if len(parts) > TOKENS_SHOWN:
        rows.append(("…",) * 4)
    n_used = len({which for _, which in parts})
    count = "all seven" if n_used == len(ALTERNATIVES) else f"{n_used} of the seven"
    used = f"The sentence falls into {len(parts)} part{'s' * (len(parts) != 1)}, using {count} alternatives. "
    return Step(
        "The pattern at work",
        (used if parts else "The sentence is empty: there is nothing to split. ")
        + "A part that is in the vocabulary is one token; any other is merged from its bytes.",
        shape=f"{len(sentence)} characters  ->  {len(parts)} parts  ->  {len(tokenizer.encode(sentence))} ids",
        tables=(Table(("part", "", "matched by", "ids"), tuple(rows)),),
        sources=(Source.of(TiktokenTokenizer._encode),),
    )


def _word(sentence: str, ranks: Mapping[bytes, int]) -> bytes | None:
    """Choose the part to show merging with: the longest that fits, preferably one that is not a piece itself."""
    parts = [part.encode() for part, _ in split(_as_text(sentence))]
    fitting = [part for part in parts if cell_width(_chain(part[i : i + 1] for i in range(len(part)))) <= CHAIN_CELLS]
    return max(fitting, key=lambda part: (part not in ranks, len(part)), default=None)


def _merges(tokenizer: TiktokenTokenizer, word: bytes, ranks: Mapping[bytes, int]) -> Step:
    rows = []
    for i, merge in enumerate(merges(word, ranks)):
        lowest = _fitting([f"{_bytes_text(piece)} {rank}" for rank, piece in merge.pairs], PAIRS_CELLS)
        rows.append((i, _chain(merge.parts), lowest or "none: done"))
    ids = ids_of(word, ranks)
    end = f"The pieces that remain are its tokens: {', '.join(map(str, ids))}."
    if word in ranks:
        end = f"The whole part is in the vocabulary, as {ranks[word]}, so the library skips the merging."
    return Step(
        f"Merging {label(_visible(word.decode()))}",
        "The part starts as single bytes. Each round merges one adjacent pair: of those that form a piece of the vocabulary, "
        f"the one with the lowest rank. {end}",
        formula="merge the pair with the smallest rank, until no pair is a piece",
        shape=f"{len(word)} bytes  ->  {len(ids)} id{'s' * (len(ids) != 1)}",
        tables=(Table(("", "pieces (␣ is a space)", "pairs that are pieces, with their rank"), tuple(rows)),),
        sources=(Source.of(merge_rounds), Source.of(TiktokenTokenizer._encode)),
    )


def _pieces(tokenizer: Tokenizer, sentence: str) -> Step:
    ids = tokenizer.encode(sentence)
    rows: list[tuple[str | int, ...]] = [(id, label(tokenizer.piece(id))) for id in ids[:TOKENS_SHOWN]]
    if len(ids) > TOKENS_SHOWN:
        rows.append(("…", "…"))
    return Step(
        "The sentence's tokens",
        f"This is a {type(tokenizer).__name__}, which runs in a library; the split and the merges are shown only for a "
        "tiktoken file, such as Llama 3's tokenizer.model or the embedded model's.",
        shape=f"{len(sentence)} characters  ->  {len(ids)} ids",
        tables=(Table(("id", "piece"), tuple(rows)),),
        sources=(Source.of(type(tokenizer)._encode),),
    )


def _special(tokenizer: Tokenizer) -> Step:
    special = tokenizer.special_tokens
    named = [(name, id) for name, id in special.items() if "reserved" not in name][:SPECIAL_SHOWN]
    rows: list[tuple[str | int, ...]] = [(id, name, _role(tokenizer, id)) for name, id in named]
    left = len(special) - len(named)
    if left:
        rows.append(("…", f"{left} more", ""))
    spelled = next(iter(special), None)
    sentence = "Ids that no text encodes to: they mark where a text begins and ends and who speaks. "
    if spelled:
        n = len(tokenizer.encode(spelled))
        sentence += f"Written in a prompt, {spelled} is plain text of {n} tokens, unless special=True is given."
    return Step(
        "Special tokens",
        sentence,
        shape=f"{len(special)} special tokens",
        tables=(Table(("id", "token", ""), tuple(rows)),) if rows else (),
        sources=(Source.of(Tokenizer.encode),),
    )


def _role(tokenizer: Tokenizer, id: int) -> str:
    if id == tokenizer.bos_id:
        return "BOS: before a text" if tokenizer.adds_bos else "BOS"
    if id == tokenizer.eos_id:
        return "EOS: ends a text"
    return "generation ends here" if id in tokenizer.stop_ids else ""


def _comparison(tokenizers: Sequence[Tokenizer], sentence: str) -> Step:
    encoded = [tokenizer.encode(sentence) for tokenizer in tokenizers]
    longest = max(map(len, encoded))
    rows: list[tuple[str | int, ...]] = []
    for i in range(min(longest, TOKENS_SHOWN)):
        row: list[str | int] = []
        for tokenizer, ids in zip(tokenizers, encoded, strict=True):
            row += [ids[i], label(tokenizer.piece(ids[i]))] if i < len(ids) else ["", ""]
        rows.append(tuple(row))
    if longest > TOKENS_SHOWN:
        rows.append(("…",) * (2 * len(tokenizers)))
    sentences = "The same sentence in each. "
    if any(isinstance(tokenizer, SentencePieceTokenizer) for tokenizer in tokenizers):
        sentences += (
            "SentencePiece, the tokenizer of LLaMA 1 and 2, merges characters by score instead of bytes by rank, writes a "
            "space as ▁ and puts one before the text, makes each digit a token, and encodes a character without a piece as "
            "bytes, such as <0x0A>. "
        )
    return Step(
        "Compared with other tokenizers",
        sentences + "A larger vocabulary gives fewer tokens, hence less computation per text, and a larger embedding.",
        shape="\n".join(
            f"{_kind(tokenizer)}, {tokenizer.vocab_size:,} ids  ->  {len(ids)} tokens"
            for tokenizer, ids in zip(tokenizers, encoded, strict=True)
        ),
        tables=(Table(tuple(itertools.chain(*(("id", _kind(tokenizer)) for tokenizer in tokenizers))), tuple(rows)),),
        sources=tuple(dict.fromkeys(Source.of(type(tokenizer)._encode) for tokenizer in tokenizers)),
    )


def _kind(tokenizer: Tokenizer) -> str:
    """Return the usual name of a tokenizer's kind."""
    kinds = {TiktokenTokenizer: "tiktoken", SentencePieceTokenizer: "SentencePiece", HuggingFaceTokenizer: "tokenizer.json"}
    return kinds[type(tokenizer)]


# ------------------------------------------------------------------------------------------------------------------ characters


def _as_text(sentence: str) -> str:
    """Replace halves of surrogate pairs, as encode() does."""
    return sentence.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _folded(text: str) -> list[str]:
    """Break a text into lines, after each newline and where a line is full."""
    lines = [""]
    for c in text:
        if lines[-1].endswith("\n") or cell_width(_visible(lines[-1] + c)) > SENTENCE_CELLS:
            lines.append("")
        lines[-1] += c
    return lines


def _visible(s: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in s)


def _bytes_text(data: bytes) -> str:
    """Format one part of a word; bytes that are not UTF-8 as `<E2>`."""
    text = "".join(
        f"<{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else _visible(c)
        for c in data.decode("utf-8", "surrogateescape")
    )
    return text.replace(" ", "␣")


def _chain(parts: Iterable[bytes]) -> str:
    return "·".join(map(_bytes_text, parts))


def _fitting(items: Iterable[str], room: int) -> str:
    """Join as many items as fit in `room` columns; an ellipsis stands for the others."""
    items, line = list(items), ""
    for i, item in enumerate(items):
        longer = f"{line}, {item}" if line else item
        if cell_width(longer) > room - (3 if i < len(items) - 1 else 0):
            return f"{line}, …" if line else "…"
        line = longer
    return line
