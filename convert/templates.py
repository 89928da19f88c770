"""Find a checkpoint's chat templates, and the one of npllama's own formats that writes the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from npllama import checkpoint, templates
from npllama.chat import FORMATS, ChatFormat, Messages, default_system_of_template
from npllama.checkpoint import CheckpointError, read_json
from npllama.checkpoint.foreign import read_bytes
from npllama.errors import NpllamaError, shown
from npllama.tokenizer import Tokenizer

from .conversion import Report, Source


def _conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# A format counts as equal to a template if both write the same text for each of these conversations.
PROBES: list[Messages] = [
    _conversation("Hi"),
    _conversation("Hi", system="Be kind."),
    _conversation("1+1?", "2", "And\n\n2+2?", "4.", "Why?"),
    _conversation("1+1?", "2", "2+2?", system="Be kind."),
    _conversation(" \n1+1? \n", "\t2\n\n", " 2+2?", system="\nBe kind. "),
    _conversation("", "", "", system=""),
    _conversation("1+1?", "<think>\nhm\n</think>\n\n2", "<think></think>"),
    _conversation("[INST] <|im_end|> <|eot_id|> </s>", "{{ 1 }}", "Größe 🦙"),
]
THEN = datetime(2001, 2, 3, 4, 5, 6)  # the date in the probes: a template that writes the date equals no format


def templates_of_folder(folder: Path, report: Report) -> tuple[dict[str, str], list[Path]]:
    """Return the templates of a Hugging Face folder by name, and the files that they are in, by transformers' precedence.

    chat_template.jinja and additional_chat_templates/NAME.jinja; without either, tokenizer_config.json's chat_template, one or
    several by name; without that, chat_template.json, which some folders have.
    """
    files = {"default": folder / templates.FILE}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found, read = {}, []
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = read_bytes(path, checkpoint.JSON_LIMIT, CheckpointError).decode()
                read.append(path)
            except UnicodeDecodeError:
                report(f"{path} is not UTF-8, expected a chat template: left out")
    if found:
        return found, read
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = read_json(path).get("chat_template") if path.is_file() else None
        if named := templates.named_templates(value):
            return named, [path]
        if value is not None:
            report(f"{path}: chat_template is {shown(value)}, expected a text or a list of name and template: left out")
    return {}, []


def templates_of_gguf(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return the templates in a GGUF file's metadata by name."""
    key = "tokenizer.chat_template"
    names = {
        metadata_key: metadata_key.removeprefix(key + ".") for metadata_key in metadata if metadata_key.startswith(key + ".")
    }
    return {
        name: text
        for metadata_key, name in {key: "default", **names}.items()
        if isinstance(text := metadata.get(metadata_key), str)
    }


def add_templates(source: Source, named: Mapping[str, str], tokenizer: Tokenizer | None, folder: Path, report: Report) -> None:
    """Store templates with the model, and the format that writes the same as the model's own, for use without jinja2.

    tokenizer   the source's, or None where its package is missing
    folder      has tokenizer_config.json, which names special tokens
    """
    stored = {}
    for name, text in named.items():
        if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
            report(f"chat template {shown(name)} is left out: expected a name of letters, digits, _ and -")
        elif not text.strip():
            report(f"chat template {name} is left out: it is empty")
        elif len(data := text.encode("utf-8", "replace")) > checkpoint.JSON_LIMIT:
            report(f"chat template {name} is left out: it is {len(data):,} bytes, expected at most {checkpoint.JSON_LIMIT:,}")
        else:
            stored[name] = source.tokenizer[templates.file_of(name)] = data
    if "default" not in stored:
        has = f"none of its own, but {', '.join(stored)}" if stored else "none"
        report(f"chat template: {has}; npllama chat asks for --format")
        return
    names = "" if len(stored) == 1 else f", and {', '.join(name for name in stored if name != 'default')}"
    report(f"chat template: the model's own{names}; {_tried(source, named['default'], tokenizer, folder)}")


def _tried(source: Source, template: str, tokenizer: Tokenizer | None, folder: Path) -> str:
    """Set the format that writes the same, if there is one; return a description of the result."""
    if tokenizer is None or (missing := templates.missing_package()):
        return "not tried: " + ("the tokenizer's package is not installed" if tokenizer is None else str(missing))
    own = ChatFormat("default", tokenizer, None, template, "the template", templates.template_variables(folder))
    try:
        own.prompt(PROBES[0], THEN)
    except NpllamaError as error:
        return f"it fails: {error}"
    for name in FORMATS:
        for system in {None: 0, default_system_of_template(template): 0}:
            if _writes_the_same(ChatFormat(name, tokenizer, system), own):
                source.generation |= {"chat_format": name, "system": system}
                return f"where jinja2 is missing, {name} writes the same"
    return "no other format writes the same, so npllama chat needs jinja2"


def _writes_the_same(format: ChatFormat, own: ChatFormat) -> bool:
    try:
        return all(format.prompt(messages).ids == own.prompt(messages, THEN).ids for messages in PROBES)
    except ValueError:  # one of both refuses a conversation
        return False
