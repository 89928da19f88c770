"""Compare the chat formats with their publishers' own, spelled out."""

from __future__ import annotations

import pytest

from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.chats import CONVERSATIONS, SPECIALS
from npllama.golden.conformance.measuring import exact

ANSWER, LAST = "Four, I'd say.", "Ça alors! 🦙"
TURNS = {
    # llama-models 0.3.0, llama3/chat_format.py
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nAnswer in one word.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{ANSWER}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{LAST}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    # Meta's llama repository, llama/generation.py
    "llama2": "<s>[INST] <<SYS>>\nAnswer in one word.\n<</SYS>>\n\nWhat is 2 + 2? [/INST] "
    f"{ANSWER} </s><s>[INST] {LAST} [/INST]",
    # the chat template of SmolLM2-135M-Instruct
    "chatml": "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n<|im_start|>user\n{LAST}<|im_end|>\n<|im_start|>assistant\n",
    # mistral-common, tokenizer version 3
    "mistral": f"<s>[INST]What is 2 + 2?[/INST]{ANSWER}</s>[INST]Answer in one word.\n\n{LAST}[/INST]",
    # the chat template of TinyLlama-1.1B-Chat-v1.0
    "zephyr": "<s><|system|>\nAnswer in one word.</s>\n<|user|>\nWhat is 2 + 2?</s>\n"
    f"<|assistant|>\n{ANSWER}</s>\n<|user|>\n{LAST}</s>\n<|assistant|>\n",
}
SPACES = {
    "llama3": "\n\n \n hello \n<|eot_id|>",
    "llama2": "[INST] hello [/INST]",
    "chatml": "user\n \n hello \n<|im_end|>",
    "mistral": "[INST] \n hello \n[/INST]",
    "zephyr": "<|user|>\n \n hello \n</s>",
}


def spelled(path: str) -> str:
    """Return the text of a case's ids."""
    case, pieces = cases()[path], []
    for id in exact(case)["ids"].astype(int).tolist():
        pieces.append(case.arguments["specials"][id - 256].encode() if id >= 256 else bytes([id]))
    return b"".join(pieces).decode()


@pytest.mark.parametrize("name", SPECIALS)
def test_several_turns(name):
    assert spelled(f"L8/chat/{name}_turns") == TURNS[name]


@pytest.mark.parametrize("name", SPECIALS)
def test_spaces_at_the_ends_of_a_content(name):
    assert SPACES[name] in spelled(f"L8/chat/{name}_spaces")


def test_special_tokens_are_ids_where_the_format_has_them_and_text_where_a_message_does():
    for name, specials in SPECIALS.items():
        ids = exact(cases()[f"L8/chat/{name}_turns"])["ids"].astype(int).tolist()
        assert sum(id >= 256 for id in ids) == sum(TURNS[name].count(token) for token in specials)
    case = cases()["L8/chat/llama3_spelled"]
    assert case.arguments["messages"][0]["content"] == "Is <|eot_id|> a token?"
    assert bytes(id for id in exact(case)["ids"].astype(int).tolist() if id < 256).count(b"<|eot_id|>") == 1
    assert set(CONVERSATIONS) == {"question", "system", "turns", "spelled", "spaces"}
