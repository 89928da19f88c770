"""Check that npllama's own tokenizer finds the recorded ids of published tokenizers, where their files are."""

from __future__ import annotations

import pytest

from npllama.golden.conformance import run_functions
from npllama.golden.conformance.report import text
from npllama.golden.conformance.texts import TEXTS, TOKENIZERS, ids, recorded_ids


def test_every_text_is_recorded():
    assert set(recorded_ids()) == set(TOKENIZERS)
    for name in TOKENIZERS:
        assert set(recorded_ids()[name]) == set(TEXTS)
        assert len(ids(name, "words")) > 10
        assert ids(name, "composed", "encode_normalised").tolist() != ids(name, "composed").tolist()
        assert ids(name, "digits", "encode_specials") is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_our_own_tokenizers_pass(name, request):
    tokenizer = request.getfixturevalue({"llama_2": "llama2_tokenizer", "llama_3": "llama3_tokenizer"}[name])

    def encode(sha256, text):
        if sha256 != TOKENIZERS[name][1]:
            raise NotImplementedError
        return tokenizer.encode(text)

    report = run_functions("npllama", {"encode": encode}, levels=["L6"])
    assert not report.failures, text(report)
    assert sum(result.passed for result in report.results) == len(TEXTS)
