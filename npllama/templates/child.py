"""The program of the process that renders chat templates. It imports nothing from this package.

It reads requests from standard input, each a tuple (template, variables, time, seconds) written by marshal. It answers with a
line, `text N`, `error N` or (before it exits) `ended N`, and N bytes of UTF-8.

A template is an untrusted program. jinja2's sandbox keeps it away from Python's objects. As a second barrier, on systems that
can limit a process, this one can open no file, start no other process, write nothing to disk and use no more memory than given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import os
import pprint  # noqa: F401  # imported early, as are textwrap, jinja2.constants and .debug: no file can be opened later
import signal
import sys
import textwrap  # noqa: F401
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn


def compiler() -> Callable[[str], Any]:
    """Return the function that compiles a template as transformers 5.23 does (utils/chat_template_utils.py)."""
    import jinja2
    import jinja2.constants
    import jinja2.debug
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks the model's own words for training: render its body."""

        tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    class Dictionary:
        """`dict` in a template: create a dict; of its attributes only fromkeys is available."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """`namespace` in a template: refuse names that begin with an underscore, which are Python's own."""

        def __init__(*args: Any, **values: Any) -> None:  # so that `self` can be among the values
            for name in (values := dict(*args[1:], **values)):
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": Dictionary(), "namespace": Namespace}
    return functools.lru_cache(16)(environment.from_string)


def clock(now: datetime) -> Callable[[str], str]:
    """Return the function that templates call as strftime_now."""

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    return strftime_now


def limit(memory: int) -> None:
    """Drop, for good, the rights that no template needs, as far as the system has such limits; memory 0: no limit."""
    os.environ.clear()
    with contextlib.suppress(ImportError):  # Windows
        import resource

        limits = {"RLIMIT_AS": memory} if memory else {}
        for name, most in {
            **limits,
            **dict.fromkeys(("RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE", "RLIMIT_NOFILE"), 0),
        }.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has every one
                resource.setrlimit(getattr(resource, name), (most, most))


def answer(kind: str, text: str) -> None:
    """Write one answer."""
    data = text.encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(f"{kind} {len(data)}\n".encode() + data)
    sys.stdout.buffer.flush()


def main(memory: int) -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    alarm = getattr(signal, "alarm", lambda seconds: None)  # ends this process even if the parent was killed meanwhile
    compiled = compiler()
    compiled("{{ now('%d %b %Y') | tojson }}").render(now=clock(datetime.now()))  # what that imports is imported now
    limit(memory)
    answer("text", "")
    while True:
        try:
            template, variables, time, seconds = marshal.load(sys.stdin.buffer)
        except EOFError:
            return
        alarm(seconds)
        try:
            text = compiled(template).render(variables, strftime_now=clock(datetime.fromisoformat(time)))
        except MemoryError:
            answer("ended", "it takes too much memory")
            return
        except Exception as error:
            answer("error", f"{error}" or type(error).__name__)
        else:
            answer("text", text)
        alarm(0)
