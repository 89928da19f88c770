"""Make tokenizer files that npllama loads from the vocabulary in a GGUF file's metadata.

Metadata are plain Python values by their GGUF name: `tokenizer.ggml.model`, `.tokens`, `.scores`, `.token_type`, `.merges`,
`.pre`, `.bos_token_id`... Their meaning is defined by llama.cpp's src/llama-vocab.cpp and the GGUF specification (ggml,
docs/gguf.md).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping

from npllama.tokenizer import LLAMA3_PATTERN

Metadata = Mapping[str, object]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types; SentencePiece's numbers are the same

# The rest, by `tokenizer.ggml.pre`: how a text is split before the merges, as in the published tokenizer.json of the models
# that the name refers to; `default` is defined by llama.cpp alone. llama.cpp's ids are the same, except for `tekken`: it
# doesn't count combining marks as letters, and Mistral's own tekken.json does.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = [{**_BYTE_LEVEL, "use_regex": True}]


def _split(*patterns: str) -> list[dict[str, object]]:
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    return [*splits, {**_BYTE_LEVEL, "use_regex": False}]


_LLAMA3 = _split(LLAMA3_PATTERN)
_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]
_TEKKEN = _split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = _split(
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# DeepSeek's letters, of which its published pattern lists the ranges: those of scripts with two cases, as far as it knows them.
_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1 3a3-3f5 "
    "3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 "
    "1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 "
    "1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 "
    "213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f a771-a787 "
    "a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 "
    "118a0-118df 1e900-1e943"
)


def _class(ranges: str) -> str:
    r"""Return hexadecimal ranges as a pattern: "41-5a b5" is [\x{41}-\x{5a}\x{b5}]."""
    return "[" + re.sub(r"[0-9a-f]+", r"\\x{\g<0>}", ranges).replace(" ", "") + "]"


# As llama.cpp splits: the published character class of signs has U+3000 too, which llama.cpp treats as a space first.
_DEEPSEEK = _split(
    r"[\r\n]",
    r"\s?" + _class(_LETTERS) + "+",
    r"\s?" + _class("21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3001-3002") + "+",
    r"\s+\z",
    _class("4e00-9fa5 800-4e00 ac00-d7ff") + "+",
    r"\p{N}+",
)
_SEED_CODER = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "deepseek-llm": _DEEPSEEK,
    "default": _DEFAULT,
    "falcon3": _LLAMA3,
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "refact": _DIGITS,
    "seed-coder": _SEED_CODER,
    "smaug-bpe": _LLAMA3,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "tekken": _TEKKEN,
}
# These look up a whole word before they merge, and prepend BOS where add_bos_token is left out.
WHOLE_WORDS = {"falcon3", "llama-bpe", "llama-v3", "llama3", "tekken"}


def tokenizer_file(metadata: Metadata) -> tuple[str, bytes]:
    """Return the tokenizer's file name and content: tokenizer.json for a `gpt2` vocabulary, tokenizer.model for `llama`.

    tokenizer_config() belongs to it. Raises ValueError for an unknown kind or `pre`, and for damaged metadata.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return "tokenizer.json", _byte_level(metadata)
    if kind == "llama":
        return "tokenizer.model", _sentencepiece(metadata)
    raise ValueError(f"tokenizer.ggml.model is {kind!r:.60}, expected gpt2 or llama")


def tokenizer_config(metadata: Metadata) -> bytes:
    """Return tokenizer_config.json, for what the tokenizer's file can't hold: BOS, whether it is added, stop tokens."""
    tokens = _tokens(metadata)
    values: dict[str, object] = {"add_bos_token": _adds_bos(metadata)}
    for name in ("bos", "eos", "eot", "eom"):
        if (id := _id(metadata, name, len(tokens))) is not None:
            values[f"{name}_token"] = tokens[id]
    if metadata.get("tokenizer.ggml.model") == "llama" and (added := _added(metadata, len(tokens))):
        values["added_tokens_decoder"] = {str(id): {"content": tokens[id], "special": False} for id in added}
    return (json.dumps(values, indent=2) + "\n").encode()


def _byte_level(metadata: Metadata) -> bytes:
    """Make a tokenizer.json of byte-level BPE. Special tokens keep their ids by being in the vocabulary."""
    pre = metadata.get("tokenizer.ggml.pre", "default")  # files of before April 2024 have none
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r:.60}, expected one of {', '.join(PRE_TOKENIZERS)}")
    tokens = _tokens(metadata)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(id for id, token in enumerate(tokens) if vocabulary[token] != id)
        raise ValueError(f"tokenizer.ggml.tokens holds {tokens[twice]!r:.60} twice, as {twice} and {vocabulary[tokens[twice]]}")
    merges = []
    for merge in _list(metadata, "merges", str):
        left, _, right = merge.partition(" ") if merge[:1] != " " else ("", "", "")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"tokenizer.ggml.merges holds {merge!r:.60}, expected two tokens whose union is a token")
        merges.append([left, right])
    added = [
        {"id": id, "content": tokens[id], "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id, kind in enumerate(_types(metadata, len(tokens)))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    post_processor = None
    if _adds_bos(metadata) and (bos := _id(metadata, "bos", len(tokens))) is not None:
        token = tokens[bos]
        first, second = (
            [{"SpecialToken": {"id": token, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1)
        )
        post_processor = {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
        }
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": post_processor,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()


def _sentencepiece(metadata: Metadata) -> bytes:
    """Make a SentencePiece ModelProto, field by field (sentencepiece, src/sentencepiece_model.proto): BPE, no normalisation."""
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    scores = _list(metadata, "scores", float, len(tokens))
    bos, eos = _id_or(1, metadata, "bos", len(tokens)), _id_or(2, metadata, "eos", len(tokens))
    for id in _added(metadata, len(tokens)):
        types[id] = UNUSED  # SentencePiece would find them after it has prepended a space to the text, llama.cpp before
    types[bos] = types[eos] = CONTROL  # SentencePiece has no other control tokens
    if (n := types.count(BYTE)) not in (0, 256):
        raise ValueError(f"tokenizer.ggml.token_type has {n} bytes, expected 256 or none")
    if (n := types.count(UNKNOWN)) != 1:
        raise ValueError(f"tokenizer.ggml.token_type has {n} unknown tokens, expected one")
    unknown = types.index(UNKNOWN)
    pieces = [
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, type))
        for token, score, type in zip(tokens, scores, types, strict=True)
    ]
    trainer = [
        _field(3, 2),
        _field(4, len(tokens)),
        _field(35, int(BYTE in types)),
    ]  # model_type BPE, vocab_size, byte_fallback
    for field, id in ((40, unknown), (41, bos), (42, eos)):  # and the names of the same, five further on
        trainer += [_field(field, id), _field(field + 5, tokens[id].encode())]
    normalizer = [
        _field(1, b"identity"),
        _field(3, int(_flag(metadata, "add_space_prefix", True))),
        _field(4, int(_flag(metadata, "remove_extra_whitespaces", False))),
        _field(5, 1),  # a space is ▁
    ]
    return b"".join([*pieces, _field(2, b"".join(trainer)), _field(3, b"".join(normalizer))])


def _added(metadata: Metadata, n: int) -> list[int]:
    """Return the user-defined tokens, which are matched in a text before the rest of it is split."""
    ends = (_id_or(1, metadata, "bos", n), _id_or(2, metadata, "eos", n))
    return [id for id, kind in enumerate(_types(metadata, n)) if kind == USER_DEFINED and id not in ends]


def _field(number: int, value: int | bytes) -> bytes:
    """Encode a protobuf field: a number as a varint, bytes with their length before them."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _tokens(metadata: Metadata) -> list[str]:
    return _list(metadata, "tokens", str)


def _types(metadata: Metadata, n: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in metadata:
        return [NORMAL] * n
    return _list(metadata, "token_type", int, n)


def _list(metadata: Metadata, name: str, kind: type, n: int | None = None) -> list:
    """Return a copy of a list of n values, or of at least one, all of one type (an int counts as a float)."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(values, list) or not values or not all(type(value) in kinds for value in values):
        raise ValueError(f"tokenizer.ggml.{name} is {values!r:.60}, expected a list of {kind.__name__}")
    if n is not None and len(values) != n:
        raise ValueError(f"tokenizer.ggml.{name} has {len(values)} entries, expected {n}, one for each token")
    return list(values)


def _id(metadata: Metadata, name: str, n: int) -> int | None:
    return _id_or(0, metadata, name, n) if f"tokenizer.ggml.{name}_token_id" in metadata else None


def _id_or(otherwise: int, metadata: Metadata, name: str, n: int) -> int:
    id = metadata.get(f"tokenizer.ggml.{name}_token_id", otherwise)
    if type(id) is not int or not 0 <= id < n:
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {id!r:.60}, expected 0 to {n - 1}")
    return id


def _flag(metadata: Metadata, name: str, otherwise: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", otherwise)
    if type(value) is not bool:
        raise ValueError(f"tokenizer.ggml.{name} is {value!r:.60}, expected true or false")
    return value


def _adds_bos(metadata: Metadata) -> bool:
    usual = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
    return _flag(metadata, "add_bos_token", usual)
