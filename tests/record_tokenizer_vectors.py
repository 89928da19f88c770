"""Record npllama/golden/conformance/recorded_ids.json with the publishers' libraries, from the published tokenizers' files.

python tests/record_tokenizer_vectors.py LLAMA_2/tokenizer.model LLAMA_3/tokenizer.model SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import sentencepiece
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from npllama.golden.conformance import texts
from npllama.golden.mistakes import MISTAKES
from npllama.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIAL_TOKENS

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from tokenizer_judges import smollm2_library

RECORDED = Path(texts.__file__).with_name("recorded_ids.json")


def llama_2(path: Path) -> tuple[int, Callable[..., list[int]]]:
    """Return the id of BOS and the library's encoding; with `special`, control tokens that the text spells are tokens."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(text: str, special: bool = False) -> list[int]:
        if not special or "</s>" not in text:
            return model.encode(text)
        before, _, rest = text.partition("</s>")
        return [*model.encode(before), model.eos_id(), *model.encode(rest)]

    return model.bos_id(), encode


def llama_3(path: Path) -> tuple[int, Callable[..., list[int]]]:
    """Return the same of tiktoken."""
    ranks = load_tiktoken_bpe(str(path))
    names = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
    model = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=names)

    def encode(text: str, special: bool = False) -> list[int]:
        return model.encode(text, allowed_special="all" if special else set(), disallowed_special=())

    return names["<|begin_of_text|>"], encode


def smollm2(path: Path) -> tuple[int, Callable[..., list[int]]]:
    """Return the same of tokenizers."""
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    library = smollm2_library(metadata)

    def encode(text: str, special: bool = False) -> list[int]:
        library.encode_special_tokens = not special
        return library.encode(text, add_special_tokens=False).ids

    return metadata["tokenizer.ggml.bos_token_id"], encode


def main() -> None:
    """Write the file."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for (name, (_, sha256)), make, path in zip(
        texts.TOKENIZERS.items(), (llama_2, llama_3, smollm2), map(Path, sys.argv[1:]), strict=True
    ):
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise SystemExit(f"{path} is not the tokenizer of {name}")
        bos, encode = make(path)
        found[name] = {}
        for key, (_, text) in texts.TEXTS.items():
            right = encode(text)
            found[name][key] = {"right": right}
            for mistake in (m for m in MISTAKES.values() if "encode" in m.outside):
                if (wrong := mistake.outside["encode"](text, encode, bos)) != right:
                    found[name][key][mistake.name] = wrong
    lines = [
        f' "{name}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(ids)}" for key, ids in of_name.items()) + "\n }"
        for name, of_name in found.items()
    ]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
