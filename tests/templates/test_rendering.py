"""Test the process that renders chat templates: its output, and the limits on hostile templates."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from npllama import templates
from npllama.templates import Renderer, TemplateError, child, rendering

pytest.importorskip("jinja2", reason="jinja2 is not installed")


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(seconds=60)
    yield renderer
    renderer.close()


def test_a_template_is_rendered(renderer: Renderer) -> None:
    template = "{% for message in messages %}\n  {{ message.content | trim }}\n{% endfor %}{{ strftime_now('%d %b %Y') }}"
    variables = {"messages": [{"content": " é🦙\n"}, {"content": "\ud800"}]}
    assert renderer.render(template, variables, datetime(2024, 7, 26)) == "  é🦙\n  \ud800\n26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),  # jinja2's own escapes for HTML
        ("{{ [1, 2] | tojson(indent=1, separators=(',', ':')) }}", "[\n 1,\n 2\n]"),
        ("{% generation %}{% set x = 1 %}a{% endgeneration %}{{ x is defined }}", "aFalse"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}", "4"),
        ("{{ dict(a=1) }}{{ dict.fromkeys('b') }}", "{'a': 1}{'b': None}"),
        ("{{ (1, 2) | pprint }}{{ 'aa bb' | wordwrap(2) }}{{ lipsum(0) }}", "(1, 2)aa\nbb"),
        ("{{ bos_token }}{{ tools is none }}{{ documents is defined }}", "True" + "False"),
        ("{% if true %}\n    {% set x = 1 %}\na{% endif %}\nb", "ab"),
        ("a\n", "a"),  # jinja2 drops the last newline
    ],
)
def test_what_a_template_can_use(renderer: Renderer, template: str, text: str) -> None:
    assert renderer.render(template, {"tools": None}) == text


def test_the_compiler_alone() -> None:
    compiled = child.compiler()
    assert compiled("{{ now('%d %b %Y') }}").render(now=child.clock(datetime(2024, 7, 26))) == "26 Jul 2024"
    assert compiled("a") is compiled("a")  # once for a conversation


HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
    "{{ lipsum.__globals__['os'].listdir('/') }}": "unsafe|undefined",
    "{{ raise_exception.__globals__.sys.modules }}": "unsafe",
    "{{ strftime_now.__closure__[0].cell_contents }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format(tools) }}": "unsafe",
    "{{ '{a.__class__.x}'.format_map({'a': tools}) }}": "unsafe|no element|undefined",
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{% set n = namespace() %}{% set n.__init__ = 1 %}": "can't hold '__init__'",
    "{{ namespace(__class__=1) }}": "can't hold '__class__'",
    "{{ messages.append(1) }}": "unsafe",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}": "recursion|nested|too many",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{{ 'a' * 10 ** 11 }}": "memory",
    "{{ 'a'.ljust(10 ** 11) }}": "memory",
    "{{ '%100000000000d' % 1 }}": "memory",
    "{{ '{:>100000000000}'.format(1) }}": "memory",
    "{{ ('a' * 9000) | center(10 ** 11) }}": "memory",
    "{{ [1] * 10 ** 11 }}": "memory",
    "{{ [1] | tojson(indent=10 ** 11) }}": "memory",
    "{% set n = namespace(x='a' * 10 ** 7) %}{% for i in range(9) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "memory",
    "{{ 'a' * 17 * 2 ** 20 }}": "writes 17,825,792 bytes, expected at most 16,777,216",
    "{{ raise_exception('no \x1b[31m system\nrole') }}": r"^no \\x1b\[31m system role$",
    "{{ messages": "unexpected end of template",
    "{% nonsense %}": "unknown tag",
}


@pytest.mark.skipif(sys.platform != "linux", reason="this system holds no limit of memory")
@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_stopped(renderer: Renderer, template: str) -> None:
    with pytest.raises(TemplateError, match=HOSTILE[template]):
        renderer.render(template, {"messages": [], "tools": None})
    assert renderer.render("{{ x }}", {"x": "still here"}) == "still here"


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template", [LOOP, "{{ 7 ** (10 ** 9) }}", "{{ ('a' * 30) | replace('', 'aaaaaaaaa' * 9) | length }}" + LOOP]
)
def test_a_template_that_does_not_end_is_ended(template: str) -> None:
    renderer = Renderer(seconds=1)
    try:
        with pytest.raises(TemplateError, match="it takes longer than 1 seconds"):
            renderer.render(template, {})
        assert renderer.render("a", {}) == "a"
    finally:
        renderer.close()


def test_a_process_whose_parent_was_killed_ends_in_a_loop_too(tmp_path: Path) -> None:
    code = f"""
import marshal
from npllama.templates import Renderer
renderer = Renderer()
renderer.render("", {{}})
renderer.process.stdin.write(marshal.dumps(({LOOP!r}, {{}}, "2024-07-26", 1)))
renderer.process.stdin.flush()
print(renderer.process.pid, flush=True)
input()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        child = int(parent.stdout.readline())
        parent.kill()
    if not hasattr(os, "getpgid"):
        pytest.skip("this system has no os.getpgid to ask for a process")
    end = time.monotonic() + 60
    while time.monotonic() < end and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        os.getpgid(process)
    except ProcessLookupError:
        return False
    return (
        "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text() if Path(f"/proc/{process}/status").exists() else True
    )


def test_memory_is_measured_where_the_system_holds_no_limit(renderer: Renderer) -> None:
    measuring = Renderer(seconds=60, memory=100 << 20, measures=True)
    grow = "{% set n = namespace(x='a' * 10 ** 7) %}{% for i in range(15) %}{% set n.x = n.x ~ 'a' * 10 ** 7 %}{% endfor %}"
    try:
        assert measuring.render("{% for i in range(1000) %}{{ i }}{% endfor %}", {})
        with pytest.raises(TemplateError, match="it takes too much memory"):
            measuring.render(grow + LOOP, {})
    finally:
        measuring.close()


@pytest.mark.skipif(sys.platform != "linux", reason="this system may not limit a process")
def test_whatever_gets_past_the_sandbox_opens_no_file_or_socket_and_runs_no_program(tmp_path: Path) -> None:
    """Test the process's limits alone, as if a template had escaped the sandbox."""
    (tmp_path / "secret").write_text("secret")
    code = f"""
import os, socket, subprocess
from npllama.templates import child
child.compiler()
child.limit(1 << 30)
for attempt in (
    lambda: open({str(tmp_path / "secret")!r}),
    lambda: open({str(tmp_path / "new")!r}, "w"),
    lambda: subprocess.run(["true"]),
    lambda: socket.socket(),
    lambda: bytearray(2 << 30),
):
    try:
        attempt()
    except (OSError, MemoryError) as error:
        print(type(error).__name__)
print(os.system("true") == 0)  # no program can load its libraries
print(dict(os.environ))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError"] * 4 + ["MemoryError", "False", "{}"]
    assert not (tmp_path / "new").exists()


def test_ctrl_c_is_not_for_it(renderer: Renderer) -> None:
    renderer.render("", {})
    process = renderer.process
    if hasattr(os, "getsid"):
        assert os.getsid(process.pid) != os.getsid(0)


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = renderer.exchange

    def interrupted(process: subprocess.Popen[bytes], request: bytes, seconds: int) -> tuple[str, bytes]:
        process.stdin.write(request)
        process.stdin.flush()
        raise KeyboardInterrupt

    renderer.render("", {})
    monkeypatch.setattr(renderer, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        renderer.render("stale", {})
    monkeypatch.setattr(renderer, "exchange", real)
    assert renderer.render("fresh", {}) == "fresh"


def test_it_is_started_once_and_again_after_a_fork(renderer: Renderer) -> None:
    renderer.render("", {})
    before = renderer.process
    renderer.render("a", {})
    assert renderer.process is before
    with pytest.raises(TemplateError, match=r"^no$"):
        renderer.render("{{ raise_exception('no') }}", {})  # an error of the template doesn't end the process
    assert renderer.process is before
    renderer.owner += 1
    assert renderer.render("a", {}) == "a"
    assert renderer.process is not before
    before.kill()
    before.wait()
    before.stdin.close()
    before.stdout.close()


@pytest.mark.parametrize(
    ("version", "message"), [("3.1.5", "jinja2 is 3.1.5, expected 3.1.6 or later"), ("3.2", None), ("4.0b1", None)]
)
def test_a_jinja2_with_known_holes_is_refused(version: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering.importlib.metadata, "version", lambda name: version)
    assert message in (missing := templates.missing_package(), missing and missing.split(":")[0])


def test_a_missing_jinja2_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TemplateError, match=r"^a chat template needs the package jinja2: pip install 'npllama\[convert\]'$"):
        Renderer().render("", {})


def test_templates_of_a_model_directory(tmp_path: Path) -> None:
    assert templates.read_templates(tmp_path, {}) == {}
    config = '{"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}, 3, {"name": 1}]}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    files = ["tokenizer_config.json"]
    assert templates.read_templates(tmp_path, dict.fromkeys(files)) == {"default": "a", "rag": "b"}
    for name, text in (("a_first", "x"), ("default", "é")):
        files.append(templates.file_of(name))
        (tmp_path / files[-1]).write_text(text, encoding="utf-8")
    assert list(templates.read_templates(tmp_path, dict.fromkeys(files)).items()) == [("default", "é"), ("a_first", "x")]
    (tmp_path / templates.FILE).write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja is not UTF-8"):
        templates.read_templates(tmp_path, dict.fromkeys(files))


@pytest.mark.parametrize(
    ("config", "special_tokens_map", "expected"),
    [
        (None, None, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        (
            '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<b>"}, "eos_token": null}',
            None,
            {"bos_token": "<b>"},
        ),
        ('{"add_bos_token": false, "eos_token": "<e>"}', None, {"eos_token": "<e>"}),
        ('{"tokenizer_class": "LlamaTokenizer", "bos_token": null}', None, {"eos_token": "</s>", "unk_token": "<unk>"}),
        (
            '{"tokenizer_class": "X", "bos_token": "a"}',
            '{"bos_token": "b", "pad_token": "c"}',
            {"bos_token": "b", "pad_token": "c"},
        ),
        ('{"tokenizer_class": "X", "bos_token": "a", "added_tokens_decoder": {}}', '{"bos_token": "b"}', {"bos_token": "a"}),
        ('{"tokenizer_class": "X", "image_token": "a"}', None, {}),
    ],
)
def test_special_tokens_by_name(
    config: str | None, special_tokens_map: str | None, expected: dict[str, str], tmp_path: Path
) -> None:
    for name, text in (("tokenizer_config.json", config), ("special_tokens_map.json", special_tokens_map)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert templates.template_variables(tmp_path) == expected
