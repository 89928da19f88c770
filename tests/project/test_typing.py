"""The package declares itself typed (py.typed): a user's program passes mypy --strict."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "helpers" / "typed_user.py"


def mypy(program: Path, cache: Path) -> str:
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    # NumPy's arrays have type arguments, which a user may leave out.
    # They have no setup.cfg of ours either.
    options = ["--config-file=", "--strict", "--allow-any-generics", "--follow-imports=silent", "--cache-dir", str(cache)]
    out, err, _ = api.run([*options, str(program)])
    return out + err


def test_a_users_program_has_its_types(tmp_path):
    assert "Success" in mypy(PROGRAM, tmp_path / "cache")


def test_a_wrong_one_is_told(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import npllama, dataclasses, numpy\n"
        "npllama.Precision(64)\n"
        "npllama.read_trace('x').nothing\n"
        "npllama.load().tokenizer.encode('x')\n"
        "npllama.generate(npllama.load(), 'text')\n"
        "dataclasses.replace(npllama.model.PLAIN, embed=lambda tokens: tokens)\n"
        "dataclasses.replace(npllama.model.PLAIN, rope_frequencies=lambda K, theta: numpy.ones(K))\n"
        "dataclasses.replace(npllama.model.PLAIN, linears=lambda x, weight: x)\n"
    )
    out = mypy(wrong, tmp_path / "cache")
    assert [line for line in range(1, 9) if f"wrong.py:{line}: error" in out] == [2, 3, 4, 5, 6, 7, 8], out
