"""Check that npllama's own tokenizer finds the recorded ids of published tokenizers, where their files are."""

from __future__ import annotations

import unicodedata

import pytest

from npllama.golden.conformance import run_functions
from npllama.golden.conformance.report import text
from npllama.golden.conformance.texts import TEXTS, TOKENIZERS, ids, recorded_ids
from npllama.golden.mistakes import MISTAKES


def test_every_text_is_recorded():
    assert set(recorded_ids()) == set(TOKENIZERS)
    for name in TOKENIZERS:
        assert set(recorded_ids()[name]) == set(TEXTS)
        assert len(ids(name, "words")) > 10
        assert ids(name, "composed", "encode_normalised").tolist() != ids(name, "composed").tolist()
        assert ids(name, "digits", "encode_specials") is None


WRONG = {
    "encode_stripped": lambda encode, given: encode(given.strip()),
    "encode_normalised": lambda encode, given: encode(unicodedata.normalize("NFKC", given)),
    "encode_newlines": lambda encode, given: encode(given.replace("\r\n", "\n").replace("\r", "\n")),
}


def encode_by(name, request):
    """Return an `encode` for one of the published tokenizers, where its file is."""
    tokenizer = request.getfixturevalue(f"{name.replace('_', '')}_tokenizer")

    def encode(sha256, given):
        if sha256 != TOKENIZERS[name][1]:
            raise NotImplementedError
        return tokenizer.encode(given)

    return encode


@pytest.mark.parametrize("name", TOKENIZERS)
def test_our_own_tokenizers_pass(name, request):
    report = run_functions("npllama", {"encode": encode_by(name, request)}, levels=["L6"])
    assert not report.failures, text(report)
    assert sum(result.passed for result in report.results) == len(TEXTS)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("mistake", "wrong"), WRONG.items())
def test_a_port_that_encodes_wrongly_fails_and_is_named(mistake, wrong, name, request):
    right = encode_by(name, request)
    report = run_functions(
        "mine", {"encode": lambda sha256, given: wrong(lambda text: right(sha256, text), given)}, levels=["L6"]
    )
    assert any(MISTAKES[mistake].sentence in result.hints for result in report.failures), text(report)
    assert len(report.failures) < len(TEXTS), "some texts don't show it"
