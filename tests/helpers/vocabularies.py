"""Write GGUF metadata of other libraries' tokenizers, as llama.cpp's converters do, and read it as tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npllama.tokenizer import LLAMA3_SPECIAL_TOKENS
from npllama_convert.gguf_vocabulary import tokenizer_config, tokenizer_file


def write(metadata: dict[str, object], folder: Path) -> Path:
    name, content = tokenizer_file(metadata)
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_bytes(tokenizer_config(metadata))
    return folder / name


def metadata_of_json(path: Path, pre: object, **more: object) -> dict[str, object]:
    """Return the metadata that llama.cpp's converter writes for a tokenizer.json."""
    values = json.loads(path.read_text(encoding="utf-8"))
    ids = values["model"]["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
    types = dict.fromkeys(ids, 1) | {token["content"]: 3 if token["special"] else 4 for token in values["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types[token] for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in values["model"]["merges"]],
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def metadata_of_sentencepiece(path: Path, **more: object) -> dict[str, object]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [model.get_score(id) for id in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def metadata_of_tiktoken(path: Path) -> dict[str, object]:
    """Return the metadata of Llama 3's GGUF files, whose published tokenizer.json was made from tiktoken's file."""
    from tiktoken.load import load_tiktoken_bpe

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache
        ranks = load_tiktoken_bpe(str(path))
    chars = {byte: char for char, byte in byte_of_char().items()}
    text = {token: "".join(chars[byte] for byte in token) for token in ranks}
    # Every split of a token into two tokens is a merge, in the order of the tokens' ranks.
    merges = [
        f"{text[left]} {text[right]}"
        for token in ranks
        for _, _, left, right in sorted(
            (ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        )
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*text.values(), *LLAMA3_SPECIAL_TOKENS],
        "tokenizer.ggml.token_type": [1] * len(ranks) + [3] * len(LLAMA3_SPECIAL_TOKENS),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
    }


def byte_of_char() -> dict[str, int]:
    """Return GPT-2's byte alphabet, as in transformers."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer", reason="transformers is not installed")
    return {char: byte for byte, char in convert.bytes_to_unicode().items()}
