"""Level L8: render conversations with Jinja chat templates, as Hugging Face's apply_chat_template does, to text and ids.

The templates are written for this suite, in the styles of published ones; together they use the features that those need:
whitespace control, blocks whose line breaks are trimmed, namespace, slices, loop variables, filters, raise_exception. The texts
are recorded by tests/record_chat_vectors.py with jinja2, configured as in transformers, so that no code here runs a template.
The vocabulary is that of chats.py: a text's UTF-8 bytes, and 256 + n for special token n.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.foreign import parse_json


@dataclass(frozen=True)
class ChatTemplate:
    """Describe a template.

    purpose   what it tests
    specials  the special tokens: the first is bos_token, the second eos_token
    text      the template
    """

    purpose: str
    specials: tuple[str, ...]
    text: str

    @property
    def variables(self) -> dict[str, str]:
        """Return the special tokens by the names that a template knows."""
        return {"bos_token": self.specials[0], "eos_token": self.specials[1]}


TEMPLATES = {
    "headers": ChatTemplate(
        "whitespace control; a default system message, slices and the filter trim",
        ("<|begin|>", "<|end|>", "<|start|>", "<|content|>"),
        """\
{{- bos_token }}
{%- set loop_messages = messages %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = 'Be brief.' %}
{%- endif %}
{{- '<|start|>system<|content|>\\n' + system_message + eos_token + '\\n' }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {%- endif %}
    {{- '<|start|>' + message['role'] + '<|content|>\\n' + message['content'] | trim + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|content|>\\n' }}
{%- endif %}
""",
    ),
    "blocks": ChatTemplate(
        "blocks on lines of their own: trim_blocks and lstrip_blocks are on",
        ("<s>", "</s>"),
        """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
{{ message.content }}

    {% elif message.role == 'user' %}
### Question
{{ message.content }}

    {% else %}
### Answer
{{ message.content }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
### Answer

{% endif %}
""",
    ),
    "turns": ChatTemplate(
        "namespace, loop.first, loop.last and methods of texts: the system message is part of the last question",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
    {%- if loop.first %}{{ bos_token }}{% endif -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = message.content ~ '\\n\\n' -%}
    {%- elif message.role == 'user' -%}
        {{ '[INST] ' ~ (ns.system if loop.last else '') ~ message.content ~ ' [/INST]' }}
    {%- else -%}
        {{ ' ' ~ message.content.strip() ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
    ),
    "json": ChatTemplate(
        "the filter tojson, which keeps all characters and the order of keys; break; a last line break that is dropped",
        ("<|bos|>", "<|eos|>"),
        """\
{{ bos_token }}{% for message in messages %}{% if loop.index > 8 %}{% break %}{% endif %}
{{ message | tojson }}{{ eos_token }}
{% endfor %}
{{ '{"role": "assistant", "content": "' if add_generation_prompt }}
""",
    ),
}


@functools.cache
def recorded_texts() -> dict[str, Any]:
    """Return template -> conversation -> {"right": text, mistake: text}."""
    return parse_json((importlib.resources.files(__package__) / "recorded_chats.json").read_bytes())


def rendered(template: str, messages: Sequence[Mapping[str, str]], mistake: str = "right") -> str | None:
    """Return the recorded text of a conversation, or that of a mistake; None if the mistake changes nothing."""
    name = next(name for name, made in TEMPLATES.items() if made.text == template)
    found = next(found for found in recorded_texts()[name].values() if found["messages"] == list(messages))
    return found.get(mistake)


def ids_of_text(text: str, specials: Sequence[str]) -> list[int]:
    """Return a text's bytes, and the ids of the special tokens in it."""
    ids: list[int] = []
    for i, piece in enumerate(re.split("(" + "|".join(map(re.escape, specials)) + ")", text)):
        ids += [256 + specials.index(piece)] if i % 2 else piece.encode()
    return ids


def as_outputs(text: str, specials: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the text's UTF-8 bytes and its ids.    int64 [bytes], int64 [n]"""
    return np.array(list(text.encode()), np.int64), np.array(ids_of_text(text, specials), np.int64)
