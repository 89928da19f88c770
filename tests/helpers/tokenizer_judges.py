"""Compare a tokenizer with a reference on the 10,000 mixed texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npllama.tokenizer import Tokenizer

from make_corpus import as_unicode, make_corpus

CORPUS = make_corpus(10_000)
Judge = Callable[[str], list[int]]


def mismatches(tokenizer: Tokenizer, judge: Judge, special: bool = False) -> list[str]:
    """Return a line for each text whose ids differ; with special tokens, of the texts that may spell one."""
    found = []
    for text in CORPUS if not special else [text for text in CORPUS if "<" in text]:
        ids, expected = tokenizer.encode(text, special=special), judge(as_unicode(text))
        if ids != expected:
            at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
            found.append(f"{text!r:.80}: {ids[at : at + 4]}, expected {expected[at : at + 4]}, from id {at} on")
    return found


def sentencepiece_judge(path: Path) -> Judge:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
