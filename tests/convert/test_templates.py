"""Test which of npllama's own formats equals a checkpoint's template, and chat with a converted model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import npllama
from npllama import templates
from npllama.chat import ChatError, chat_format
from npllama.cli import main
from npllama.templates import rendering
from npllama.tokenizer import load_tokenizer
from npllama_convert.conversion import Source
from npllama_convert.templates import add_templates, templates_of_folder, templates_of_gguf

import foreign
import tiny

pytest.importorskip("jinja2", reason="jinja2 is not installed")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace(
    "%}{{ '<|im_start|>' + m.role",
    "%}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role",
    1,
)
# Phi-4's, whose tags are ChatML's except for <|im_sep|>: detection by tags alone took it for ChatML.
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
R1 = (
    "{% for m in messages %}{% set content = m.content.split('</think>') | last %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def source(**tokenizer: bytes) -> Source:
    return Source("test", tiny.config(n_layers=1), {}, [], tokenizer={**tokenizer})


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHATML, {"chat_format": "chatml", "system": None}),
        (SMOLLM2, {"chat_format": "chatml", "system": "You are SmolLM."}),
        (PHI4, {}),
        (CHATML.replace("m.content", "m.content | trim"), {}),
        (CHATML.replace("{% for", "{{ strftime_now('%Y') }}{% for"), {}),
        ("{{ '<|im_start|>' }}" + CHATML, {}),  # begins as BOS would
        (R1, {}),
        ("{{ raise_exception('no') }}", {}),
        ("{{ messages", {}),
    ],
)
def test_a_format_is_stored_only_if_it_writes_the_same(
    template: str, found: Mapping[str, object], tiny_chatml_file: Path
) -> None:
    made, lines = source(), []
    add_templates(made, {"default": template}, load_tokenizer(tiny_chatml_file), tiny_chatml_file.parent, lines.append)
    assert made.generation == found
    assert made.tokenizer == {"chat_template.jinja": template.encode()}
    assert lines[0].startswith("chat template: the model's own; ")
    assert ("where jinja2 is missing, chatml writes the same" in lines[0]) == bool(found)


def test_what_is_not_tried_is_said(tiny_chatml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    add_templates(source(), {"default": CHATML}, None, tiny_chatml_file.parent, lines.append)
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    made = source()
    add_templates(made, {"default": CHATML}, load_tokenizer(tiny_chatml_file), tiny_chatml_file.parent, lines.append)
    assert ["not tried: the tokenizer's package is not" in lines[0], "not tried: a chat template needs" in lines[1]] == [
        True
    ] * 2
    assert not made.generation


def test_a_template_that_is_too_long_is_left_out(tiny_chatml_file: Path) -> None:
    made, lines = source(), []
    add_templates(made, {"default": "a" * (5 << 20)}, None, tiny_chatml_file.parent, lines.append)
    assert lines[0] == "chat template default is left out: it is 5,242,880 bytes, expected at most 4,194,304"
    assert not made.tokenizer


def test_templates_of_a_folder_come_in_transformers_order(tmp_path: Path) -> None:
    assert templates_of_folder(tmp_path, print) == ({}, [])
    expected: dict[str, str] = {}
    for name, content in (
        ("chat_template.json", {"chat_template": "1"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "2"}]}),
        ("additional_chat_templates/rag.jinja", "3"),
        ("chat_template.jinja", "4"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        expected = {"default": "4", "rag": "3"} if name == "chat_template.jinja" else {"default": "1"}
        expected = {"rag": "3"} if "rag" in name else {"default": "2"} if name == "tokenizer_config.json" else expected
        assert templates_of_folder(tmp_path, print)[0] == expected


def test_templates_of_a_gguf_file() -> None:
    key = "tokenizer.chat_template"
    assert templates_of_gguf({key: "a", f"{key}.rag": "b", "tokenizer.chat_templates": ["rag"], f"{key}.x": 1}) == {
        "default": "a",
        "rag": "b",
    }


@pytest.fixture(scope="module")
def converted(tiny_chatml_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Convert Hugging Face folders with these templates."""
    from npllama_convert import sources
    from npllama_convert.conversion import write

    folder = tmp_path_factory.mktemp("converted")
    size = load_tokenizer(tiny_chatml_file).vocab_size
    config = tiny.config(n_layers=1, vocab_size=size, max_seq_len=512)
    made = {}
    for name, template in {"phi4": PHI4, "smollm2": SMOLLM2, "r1": R1, "none": None}.items():
        src = foreign.write_hf(folder / f"{name}-src", config, tiny.random_params(config, seed=5))
        shutil.copy(tiny_chatml_file, src / "tokenizer.json")
        values = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template}
        (src / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **values}))
        made[name] = folder / name
        write(sources.read(src, report=len), made[name], report=len)
    return made


@pytest.mark.parametrize("name", ["phi4", "smollm2", "r1"])
def test_a_converted_model_s_ids_are_hugging_face_s(name: str, converted: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = npllama.load(converted[name])
    judge = transformers.PreTrainedTokenizerFast.from_pretrained(converted[name])
    format = chat_format(model)
    for messages in (
        [{"role": "user", "content": "Hi "}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": ""}],
        [{"role": role, "content": f"<think>x</think>{role}\n"} for role in ("user", "assistant", "user")],
    ):
        prompt = format.prompt(messages)
        assert prompt.text == judge.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.ids == judge.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_without_jinja2_another_format_is_used_only_if_it_writes_the_same(
    converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": " Hi "}]
    expected = chat_format(npllama.load(converted["smollm2"])).prompt(messages)
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    format = chat_format(npllama.load(converted["smollm2"]))
    assert (format.name, format.prompt(messages)) == ("chatml", expected)
    with pytest.raises(ChatError, match=r"phi4: a chat template needs the package jinja2: .*; or choose a --format, which may"):
        chat_format(npllama.load(converted["phi4"]))
    with pytest.raises(ChatError, match="needs the package jinja2"):
        chat_format(npllama.load(converted["smollm2"]), "default")
    assert chat_format(npllama.load(converted["phi4"]), "chatml").name == "chatml"


def test_a_model_converted_before_templates_were_stored_uses_its_own(converted: dict[str, Path], tmp_path: Path) -> None:
    """Test an older model directory: its template is in tokenizer_config.json, its chat_format was detected from tags."""
    old = tmp_path / "old"
    shutil.copytree(converted["phi4"], old)
    (old / templates.FILE).unlink()
    for file, change in (("manifest.json", lambda v: v["files"].pop(templates.FILE)), ("config.json", _as_chatml)):
        values = json.loads((old / file).read_text())
        change(values)
        (old / file).write_text(json.dumps(values))
    format = chat_format(npllama.load(old))
    assert (format.name, format.template) == ("default", PHI4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ChatError, match="needs the package jinja2"):
            chat_format(npllama.load(old))


def _as_chatml(values: dict[str, dict[str, object]]) -> None:
    values["generation"]["chat_format"] = "chatml"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("phi4", "chat: its own template"),
        ("smollm2", "chat: its own template, or chatml where jinja2 is missing"),
        ("none", "chat: no template; npllama chat asks for --format"),
    ],
)
def test_info_says_what_chat_would_do(name: str, line: str, converted: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(converted[name])]) == 0
    out = capsys.readouterr().out
    assert line in out.splitlines()
    assert "chat_format" not in out


def test_chat_asks_for_a_format_where_there_is_no_template(converted: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", "-m", str(converted["none"])]) == 2
    error = capsys.readouterr().err
    assert (
        "none has no chat template of its own: expected --format with one of llama3, llama2, chatml, mistral, zephyr" in error
    )
    assert "(its tokenizer has the special tokens of chatml)" in error
    assert main(["chat", "-m", str(converted["none"]), "--format", "telex"]) == 2
    assert "the chat format is 'telex', expected llama3, llama2, chatml, mistral, zephyr" in capsys.readouterr().err
