"""The base class of this package's own errors."""

from __future__ import annotations


class NpllamaError(ValueError):
    """What was given can't be used; the message is one line: what was found and what was expected."""
