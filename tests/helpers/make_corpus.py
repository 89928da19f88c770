"""Write mixed text that tokenizers get wrong, to compare ids with those of the libraries. A seed reproduces it anywhere.

    python tests/helpers/make_corpus.py [N] [SEED] > corpus.jsonl        # a JSON string a line: many of the texts hold newlines

Some texts have half a surrogate pair, as Python's surrogateescape produces for a byte that isn't UTF-8. That is not Unicode
text: every tokenizer here first replaces it as `as_unicode` does.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable

WORDS = {
    "english": "the The of and I'm we'll they've don't CAN'T it's o'clock Lily's state-of-the-art e.g. Mr. naïve café hello "
    "world, (parenthetical) “quoted” — dash… question? yes! supercalifragilisticexpialidocious XMLHttpRequest iPhone a an",
    "code": "def f(x): return x**2 if(a!=b){ i++; } -> => <T> std::vector<int> #include <stdio.h> // TODO: /* */ self._x "
    "0xDEADBEEF 1e-5 \\n \\\\ ${HOME} `ls` @property &&= >>> <!-- --> {{ }} [[0]] __init__ CamelCase snake_case k8s !=",
    "chinese": "你好 世界 今天天气很好 ， 。 《红楼梦》 人工智能 的 了 我们 他们说： “是的” 龘 𠮷野家 ㊗ ｆｕｌｌ １２３ 繁體",
    "arabic": "مرحبا بالعالم ، كيف حالك ؟ العَرَبِيَّة ٣٤٥ ۱۲۳ لا إله ﷺ ـــ السلام عليكم، هذا اختبار",
    "hindi": "नमस्ते दुनिया । आप कैसे हैं ? क्षेत्र श्री १२३ हिन्दी में लिखा हुआ है ॐ र्‍य ज़रूर",
    "korean": "안녕하세요 세계 , 오늘은 어때요 ? 한국어 ㅋㅋㅋ 값이 뷁 한글 것입니다. 나는",
    "russian": "Привет , мир ! Как дела ? Москва ёлка Ё объём что это не так — да 1917-й ЪЫЬ",
    "vietnamese": "Xin chào thế giới . Tôi không biết đường Nguyễn ở đâu ? người Việt ngữ được một",
    "other": "ภาษาไทย ქართული አማርኛ עברית עִבְרִית ελληνικά Ἀθῆναι Türkçe İstanbul ıi ß ﬃ ǅ ᏣᎳᎩ தமிழ் ᚠᚢᚦ 日本語テスト ｶﾀｶﾅ",
    "emoji": "🦙 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 1️⃣ 🇮🇹🇩🇪 ❤️ ☺︎ 🧑🏿‍🚀 👁️‍🗨️ 😀😃 ✊🏻 🫠 ©️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "numbers": "0 12 345 6789 3.14159 1,000,000 -42 1e10 ½ Ⅷ ² 10% $5 €7.50 2024-01-31 12:34:56 +49 ٣٤٥ १२ ⑩ 007 10000000000",
    "special": "<|begin_of_text|> <|end_of_text|> <|eot_id|> <|start_header_id|> <|im_start|> <|im_end|> <|endoftext|> <s> "
    "</s> <unk> <0x0A> <0x41> <|im_start|>system [INST] [/INST] <<SYS>> <repo_name> <|im_ <s ></s>",
}
BLANKS = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\r\n",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\u200b",
    "\x0b",
    "\x85",
]
MARKS = "\u0300\u0301\u0303\u0308\u0327\u0336\u0489\u093c\u094d\u064e\u05b4\u0e31\u20e3\ufe0f\u200d\u200c\u202e\u2066"
CONTROLS = "\x00\x01\x04\x06\x13\x14\x16\x1b\x1d\x7f\ufeff\ufffd\ufffe\U0010ffff\ue000"


def _sentence(rng: random.Random) -> str:
    words = WORDS[rng.choice([name for name in WORDS if name != "special"])].split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 20)))


def _mixture(rng: random.Random) -> str:
    words = [word for name in rng.sample(list(WORDS), 3) for word in WORDS[name].split()]
    return "".join(rng.choice(words) + rng.choice([" ", " ", " ", "", *BLANKS]) for _ in range(rng.randint(1, 20)))


def _code(rng: random.Random) -> str:
    words = WORDS["code"].split()
    lines = [
        rng.choice([" ", "    ", "\t"]) * rng.randint(0, 4) + " ".join(rng.choice(words) for _ in range(rng.randint(0, 6)))
        for _ in range(rng.randint(1, 6))
    ]
    return rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])


def _digits(rng: random.Random) -> str:
    digits = rng.choice(["0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "0123456789.,-+e%:/ "])
    return "".join(rng.choice(digits) for _ in range(rng.randint(1, 40)))


def _blanks(rng: random.Random) -> str:
    parts = [*BLANKS, *BLANKS, "a", "'s", "1", "é"]
    return "".join(rng.choice(parts) * rng.choice([1, 1, 2, 9]) for _ in range(rng.randint(1, 9)))


def _combined(rng: random.Random) -> str:
    letters = "aeonZ क้ا한🦙 "
    return "".join(
        rng.choice(letters) + "".join(rng.choice(MARKS) for _ in range(rng.randint(0, 4))) for _ in range(rng.randint(1, 15))
    )


def _special(rng: random.Random) -> str:
    words = [*WORDS["special"].split(), "a", "hello", "user\n", "é", "▁", "\n", " "]
    return "".join(rng.choice(words) + rng.choice(["", "", " ", "\n"]) for _ in range(rng.randint(1, 10)))


def _bytes(rng: random.Random) -> str:
    data = bytearray(_sentence(rng).encode() + rng.randbytes(rng.randint(0, 8)))
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data).decode("utf-8", rng.choice(["replace", "surrogateescape"]))


def _characters(rng: random.Random) -> str:
    first, last = rng.choice([(0, 0xFF), (0, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0, 0x10FFFF)])
    chars = [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12))]
    return "".join(rng.choice([*chars, *CONTROLS, "a", " "]) for _ in range(rng.randint(1, 12)))


def _repeated(rng: random.Random) -> str:
    return rng.choice(["a", "ab", " ", "=", "-", "\n", "é", "한", "🦙", "0", "haha", "a ", "!?"]) * rng.randint(1, 200)


KINDS: list[Callable[[random.Random], str]] = [
    *[_sentence] * 4,
    *[_mixture] * 4,
    *[_code, _digits, _blanks, _combined, _special, _bytes, _characters, _repeated],
]


def make_corpus(n: int = 10_000, seed: int = 4) -> list[str]:
    """Return n different texts."""
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < n:
        texts[rng.choice(KINDS)(rng)] = None
    return list(texts)


def as_unicode(text: str) -> str:
    """Return the text with every lone surrogate replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    for text in make_corpus(*map(int, sys.argv[1:])):
        print(json.dumps(text))
