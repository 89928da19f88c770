"""Record npllama/golden/conformance/recorded_chats.json with jinja2, set up as transformers sets it up: no arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from npllama.golden.conformance import chat_templates
from npllama.golden.conformance.chats import CONVERSATIONS
from npllama.golden.mistakes import MISTAKES

RECORDED = Path(chat_templates.__file__).with_name("recorded_chats.json")
NAMES = ("question", "system", "turns", "spaces")  # a content that spells a special token becomes one in Hugging Face's


def tojson(x: Any) -> str:
    """Write JSON as Hugging Face's filter does."""
    return json.dumps(x, ensure_ascii=False)


def rendered(
    template: str,
    messages: Sequence[Mapping[str, str]],
    variables: Mapping[str, str],
    add_generation_prompt: bool = True,
    own_tojson: bool = False,
    **options: Any,
) -> str:
    """Render as transformers does, but for the options of jinja2's environment that are given."""
    made = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [jinja2.ext.loopcontrols], **options}
    environment = ImmutableSandboxedEnvironment(**made)
    if not own_tojson:
        environment.filters["tojson"] = tojson
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **variables}
    return environment.from_string(template).render(**given)


def main() -> None:
    """Write the file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, template in chat_templates.TEMPLATES.items():
        found[name] = {}
        for conversation in NAMES:
            messages = [dict(message) for message in CONVERSATIONS[conversation][1]]
            options = {"chat_template": template.text, "add_generation_prompt": True, **template.variables}
            [right], _ = render_jinja_template([messages], **options)
            if rendered(template.text, messages, template.variables) != right:
                raise SystemExit(f"{name}: jinja2 is not set up as transformers {right!r} sets it up")
            entry: dict[str, Any] = {"messages": messages, "right": right}
            for mistake in (m for m in MISTAKES.values() if "chat_template" in m.outside):
                wrong = mistake.outside["chat_template"](rendered, template.text, messages, template.variables)
                if wrong != right:
                    entry[mistake.name] = wrong
            found[name][conversation] = entry
    RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
