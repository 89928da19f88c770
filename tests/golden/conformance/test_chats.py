"""Compare the chat formats with their publishers' own, spelled out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from npllama.chat import ChatFormat
from npllama.golden.conformance import run_functions
from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.chat_templates import TEMPLATES, recorded_texts
from npllama.golden.conformance.chats import CONVERSATIONS, SPECIALS
from npllama.golden.conformance.measuring import exact
from npllama.golden.conformance.report import text
from npllama.golden.mistakes import MISTAKES
from npllama.tokenizer import Tokenizer

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


# What the suite's own templates write for the conversation `turns`, spelled out.
TEMPLATED = {
    "headers": "<|begin|><|start|>system<|content|>\nAnswer in one word.<|end|>\n"
    "<|start|>user<|content|>\nWhat is 2 + 2?<|end|>\n"
    f"<|start|>assistant<|content|>\n{ANSWER}<|end|>\n<|start|>user<|content|>\n{LAST}<|end|>\n<|start|>assistant<|content|>\n",
    "blocks": "<s>\nAnswer in one word.\n\n### Question\nWhat is 2 + 2?\n\n"
    f"### Answer\n{ANSWER}</s>\n### Question\n{LAST}\n\n### Answer\n\n",
    "turns": f"<s>[INST] What is 2 + 2? [/INST] {ANSWER}</s>[INST] Answer in one word.\n\n{LAST} [/INST]",
    "json": '<|bos|>{"role": "system", "content": "Answer in one word."}<|eos|>\n'
    '{"role": "user", "content": "What is 2 + 2?"}<|eos|>\n'
    f'{{"role": "assistant", "content": "{ANSWER}"}}<|eos|>\n{{"role": "user", "content": "{LAST}"}}<|eos|>\n'
    '{"role": "assistant", "content": "',
}


class Bytes(Tokenizer):
    """Tokenizer of the suite's vocabulary: bytes, and 256 + n for special token n."""

    bos_id = eos_id = None
    stop_ids = frozenset()

    def __init__(self, specials):
        self.special_tokens = {spelling: 256 + n for n, spelling in enumerate(specials)}
        self.vocab_size = 256 + len(specials)

    def _encode(self, text, special):
        parts = self.split_special(text) if special else [text]
        return [id for i, part in enumerate(parts) for id in ([self.special_tokens[part]] if i % 2 else part.encode())]

    def _piece(self, id):
        raise NotImplementedError

    token_bytes = _piece


def chat_template(template, messages, variables, specials):
    """Return npllama's own rendering of a model's chat template."""
    return ChatFormat("default", Bytes(specials), template=template, variables=variables).prompt(messages)


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


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_it_says(name):
    assert recorded_texts()[name]["turns"]["right"] == TEMPLATED[name]
    found = exact(cases()[f"L8/chat_template/{name}_turns"])
    assert bytes(found["text"].astype(np.uint8)).decode() == TEMPLATED[name]
    specials = TEMPLATES[name].specials
    assert sum(found["ids"] >= 256) == sum(TEMPLATED[name].count(token) for token in specials) > 0


def test_our_own_rendering_passes():
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    report = run_functions("npllama", {"chat_template": chat_template}, levels=["L8"])
    assert not report.failures, text(report)
    assert sum(result.passed for result in report.results) == 4 * len(TEMPLATES)


def test_transformers_passes():
    """Compare with apply_chat_template's text, and with that text's ids, as a fast tokenizer finds special tokens."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    pytest.importorskip("jinja2", reason="jinja2 is not installed")

    def theirs(template, messages, variables, specials):
        [found], _ = utils.render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
        return found, Bytes(specials).encode(found, special=True)

    report = run_functions("transformers", {"chat_template": theirs}, levels=["L8"])
    assert not report.failures, text(report)
    assert sum(result.passed for result in report.results) == 4 * len(TEMPLATES)


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        ("template_without_prompt", {"add_generation_prompt": False}),
        ("template_untrimmed", {"trim_blocks": False}),
        ("template_indented", {"lstrip_blocks": False}),
        ("template_newline_kept", {"keep_trailing_newline": True}),
    ],
)
def test_a_wrong_rendering_is_named(mistake, change):
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")

    def wrong(template, messages, variables, specials):
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"], **change}
        prompt = options.pop("add_generation_prompt", True)
        made = jinja2.Environment(**options)
        made.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
        found = made.from_string(template).render(messages=messages, add_generation_prompt=prompt, **variables)
        return found, Bytes(specials).encode(found, special=True)

    report = run_functions("mine", {"chat_template": wrong}, levels=["L8"])
    assert any(MISTAKES[mistake].sentence in result.hints for result in report.failures), text(report)
