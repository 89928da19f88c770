"""The base class of this package's own errors, and their messages as a line to print."""

from __future__ import annotations

import reprlib


class NpllamaError(ValueError):
    """An input can't be used; the message is one printable line: what was found and what was expected."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Escape control characters and lone surrogates: a name in a damaged file may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class _Short(reprlib.Repr):
    """A repr that takes time in proportion to its output, even for lists that share their parts or contain themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset, self.maxfrozenset = 2, 4, 8, 8, 8, 8
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 400 else f"a whole number of {x.bit_length():,} bits"

    def repr_instance(self, x: object, level: int) -> str:
        return f"{type(x).__name__} of {len(x)}" if isinstance(x, dict | list | tuple) else super().repr_instance(x, level)


def shown(value: object, longest: int = 80) -> str:
    """Show a value of a file in one line of at most `longest` characters."""
    text = printable(" ".join(_Short().repr(value).split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def reason(error: BaseException) -> str:
    """Return an exception's message as one short line."""
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    text = printable(next(iter(text.splitlines()), ""))
    return text[:200] or type(error).__name__
