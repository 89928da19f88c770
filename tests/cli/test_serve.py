"""Test the command's own errors; the server is tested in tests/serve/."""

from __future__ import annotations

import pytest

from commands import fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port is 99999, expected 0 to 65535"),
        (["--host", "192.0.2.1"], "can't listen on 192.0.2.1 port 8080: Cannot assign requested address"),
        (["--queue", "-1"], "--queue is out of range"),
        (["--time-limit", "nan"], "--time-limit is out of range"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "clé"], "not printable ASCII"),
        (["--port", "0", "--rows", "0"], "--rows is 0, expected 1 or more"),
        (["--port", "0", "--context", "0"], "--context is 0, expected 1 to the model's 512"),
        (["--port", "0", "--context", "513"], "--context is 513, expected 1 to the model's 512"),
        (["--port", "0", "--format", "none"], "the chat format is 'none', expected"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    pytest.importorskip("starlette", reason="starlette is not installed")
    assert message in fails(capsys, "serve", *arguments)
