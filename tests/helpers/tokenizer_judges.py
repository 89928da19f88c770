"""Compare a tokenizer with a reference on the 10,000 mixed texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def smollm2_library(metadata: Mapping[str, Any]) -> Any:
    """Put together SmolLM2's published pre-tokenizer and the vocabulary of its GGUF file, without our converter."""
    import tokenizers

    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    splits = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(tokens[:17])
    return library


def sentencepiece_judge(path: Path) -> Judge:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
