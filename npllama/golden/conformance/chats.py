"""Level L8: write conversations in chat formats, with special tokens distinguished from text that spells one.

The vocabulary is as simple as possible, so that no tokenizer is tested here: a text is its UTF-8 bytes, and special token n of
the case's list is 256 + n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from ...chat import FORMATS
from ...tokenizer import Tokenizer

SPECIALS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama2": ("<s>", "</s>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "zephyr": ("<s>", "</s>"),
}
ADDS_BOS = ("llama2", "mistral", "zephyr")  # where the tokenizer is SentencePiece's
USER = {"role": "user", "content": "What is 2 + 2?"}
TURNS = (USER, {"role": "assistant", "content": "Four, I'd say."}, {"role": "user", "content": "Ça alors! 🦙"})
SYSTEM = {"role": "system", "content": "Answer in one word."}
CONVERSATIONS: dict[str, tuple[str, tuple[Mapping[str, str], ...]]] = {
    "question": ("a single question", (USER,)),
    "system": ("a system message", (SYSTEM, USER)),
    "turns": ("several turns, each with its end", (SYSTEM, *TURNS)),
    "spelled": ("a message that spells a special token: it stays text", ({"role": "user", "content": "Is {} a token?"},)),
    "spaces": ("spaces at either end, which a format keeps or strips", ({"role": "user", "content": " \n hello \n"},)),
}


class _Bytes:
    """Tokenizer whose ids are bytes, followed by those of the special tokens."""

    def __init__(self, specials: Sequence[str], bos: bool):
        self.special_tokens = {spelling: 256 + n for n, spelling in enumerate(specials)}
        self._bos = [256] if bos else []

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        return [*(self._bos if bos else []), *text.encode()]


def messages_of(format: str, name: str) -> list[dict[str, str]]:
    """Return a conversation; braces in a content are replaced by a special token of the format."""
    spelled = SPECIALS[format][-1]
    return [{key: value.replace("{}", spelled) for key, value in message.items()} for message in CONVERSATIONS[name][1]]


def ids_of(format: str, messages: Sequence[Mapping[str, str]], specials: Sequence[str]) -> list[int]:
    """Return the ids of the prompt that asks for the next answer."""
    return FORMATS[format](cast(Tokenizer, _Bytes(specials, format in ADDS_BOS)), messages)


def wrong_ids(wrong: Callable[..., list[int]], format: str, messages: Any, specials: Sequence[str]) -> list[int]:
    """Return the ids with a mistake, which gets the messages, a function that gives the right ids, and the special tokens."""
    return wrong(messages, lambda given: ids_of(format, given, specials), specials)


def as_array(ids: Sequence[int]) -> np.ndarray:
    """Return ids as an output.    int64 [n]"""
    return np.array(ids, np.int64)
