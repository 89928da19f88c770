"""Messages of errors: one short line, whatever a damaged file holds."""

from __future__ import annotations

import errno

import pytest

from npllama import Config, NpllamaError
from npllama.errors import printable, reason, shown

import tiny


def test_a_caller_needs_one_except():
    assert issubclass(NpllamaError, ValueError)
    with pytest.raises(NpllamaError, match="n_heads"):
        Config.from_dict(tiny.config().to_dict() | {"n_heads": 0})


def test_a_name_with_control_characters_is_still_one_line():
    assert printable("a\nb\x1b[31m\udc80é") == "a\\nb\\x1b[31m\\udc80é"


def test_a_value_is_shown_in_so_many_characters():
    assert shown("abc") == "'abc'"
    assert shown("x" * 500) == "'" + "x" * 76 + "..."
    assert shown("a\n\nb", 20) == "'a\\n\\nb'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (ValueError("one\ntwo"), "one"),
        (ValueError("x" * 300), "x" * 200),
        (KeyError(), "KeyError"),
    ],
)
def test_the_reason_is_one_short_line(error, expected):
    assert reason(error) == expected
