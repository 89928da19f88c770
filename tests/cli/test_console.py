"""An error as a command's one line."""

from __future__ import annotations

import pytest

from npllama.cli.console import error_text, rate


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "m/config.json"), "m/config.json: No such file or directory"),
        (OSError(27, "File too large"), "File too large"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "MemoryError"),
        (KeyError("x"), "unforeseen KeyError: 'x'; please report it, with what NPLLAMA_DEBUG=1 shows"),
    ],
)
def test_an_error_is_one_line(error, expected):
    assert error_text(error) == expected


def test_no_time_at_all_is_a_rate_too():
    assert rate(3, 2.0) == "1.5 tokens/s"
    assert rate(1, 0.0).endswith(" tokens/s")
