"""The base class of this package's own errors, and their messages as a line to print."""

from __future__ import annotations


class NpllamaError(ValueError):
    """What was given can't be used; the message is one line: what was found and what was expected."""


def printable(text: str) -> str:
    """Return the text with control characters written as escapes: a name in a damaged file may hold any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
