"""Check the cases: inputs are the same bytes everywhere, each case catches a mistake, and some case each mistake."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from npllama.checkpoint.foreign import read_json
from npllama.config import Config
from npllama.golden.conformance.cases import PROFILES, cases
from npllama.golden.conformance.measuring import MARGIN, caught, exact, tolerances
from npllama.golden.conformance.numbers import Floats, Integers, words
from npllama.golden.conformance.suite import RECORDED, recorded
from npllama.golden.mistakes import MISTAKES
from npllama.golden.precision import Precision, round_bfloat16, round_float16

from checksums import weighted_sum

ENTRIES = read_json(RECORDED, ValueError)["cases"]


def test_the_generator_is_splitmix64():
    """Compare with its authors' C code, with a seed from a text's hash."""
    seed = int.from_bytes(hashlib.sha256(b"x").digest()[:8], "little")
    expected = []
    for _ in range(5):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = seed
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append(z ^ (z >> 31))
    assert words("x", 5).tolist() == expected


def test_floats_are_exact_in_every_precision_and_spread_evenly():
    x = Floats((4000,), 1).draw("x")
    assert np.array_equal(x, round_bfloat16(x))
    assert np.array_equal(x, round_float16(x))
    assert len(set(x.tolist())) == 256
    assert np.abs(x).max() < 4
    assert abs(np.mean(x)) < 0.15
    assert not np.array_equal(x, Floats((4000,), 1).draw("y"))
    assert set(Integers((500,), -3, 4).draw("x").tolist()) == set(range(-3, 4))


def test_every_case_is_recorded():
    assert list(ENTRIES) == list(cases()), "run tests/record_conformance.py"


@pytest.mark.parametrize("path", cases())
def test_inputs_are_the_recorded_bytes_and_expected_values_the_recorded_numbers(path):
    case = cases()[path]
    assert case.sha256() == ENTRIES[path]["inputs"]
    found = exact(case)
    assert found.keys() == ENTRIES[path]["sums"].keys()
    for name, y in found.items():
        total, size = ENTRIES[path]["sums"][name]
        assert np.allclose(weighted_sum(y), [total, size], rtol=0, atol=1e-13 * max(1e-300, 2.5 * size))


@pytest.mark.parametrize("path", cases())
def test_inputs_are_exact_in_16_bits_unless_a_case_is_for_others(path):
    case = cases()[path]
    if not case.profiles and not case.operation.exact:
        for x in (x for x in case.arrays.values() if x.dtype == np.float32):
            assert np.array_equal(x, round_bfloat16(x))
            assert np.array_equal(x, round_float16(x))


@pytest.mark.parametrize("path", cases())
def test_it_catches_what_is_recorded(path):
    """Check with a margin, so that it holds on every machine."""
    case, measured = cases()[path], recorded()[path]
    assert measured.catches
    limits = {name: of_output["float32"] for name, of_output in measured.tolerances.items()}
    expected, precision = exact(case), Precision("float32")
    chosen = measured.catches if case.level == "L1" else measured.catches[len(path) % 9 :: 9]  # a model takes its time
    missed = [name for name in chosen if not caught(case, MISTAKES[name], limits, precision, expected)]
    assert not missed
    assert MARGIN > 1


@pytest.mark.parametrize("path", [path for i, path in enumerate(cases()) if i % 5 == 0 and path[:2] in ("L1", "L2")])
def test_tolerances_measured_again_are_the_recorded_ones(path):
    """Allow for the order in which this machine's BLAS sums, and for the last bits of its exp and sine."""
    for profile in PROFILES:
        found = tolerances(cases()[path], profile) if not cases()[path].profiles else None
        for name, tolerance in (found or {}).items():
            held = recorded()[path].tolerances[name][profile]
            for norm in ("max", "rms"):
                a, b = getattr(tolerance, norm), getattr(held, norm)
                assert a == b == 0 or 0.4 < a / b < 2.5, (profile, name, norm)


def alone(case):
    """Compute each row of a case with a batch by itself: without a cache, from the tokens that it holds at each pass."""
    config, params = Config.from_dict(case.arguments["config"]), case.arguments["params"]
    passes, kept = [np.array(tokens) for tokens in case.arguments["passes"]], case.arguments["kept"]
    found = []
    for row in range(len(passes[0])):
        held, logits = [], []  # slots, padding among them
        for i, tokens in enumerate(passes):
            n = kept[i] if i < len(kept) else None
            held = held[: n if n is None else np.broadcast_to(n, len(tokens))[row]]
            new = tokens[row].tolist()
            held += new if max(new) >= 0 else []
            whole = [id for id in held if id >= 0]
            made = Precision("float64").forward(params, config, whole) if whole else np.zeros((0, config.vocab_size))
            rows = np.full((len(new), config.vocab_size), np.nan)
            is_token = np.array(new) >= 0
            rows[is_token] = made[len(whole) - is_token.sum() :]
            logits.append(rows)
        found.append(np.concatenate(logits))
    return np.stack(found)


@pytest.mark.parametrize(
    "path", [path for path, case in cases().items() if case.level == "L4" and np.ndim(case.arguments["passes"][0]) > 1]
)
def test_a_row_of_a_batch_is_the_sequence_by_itself(path):
    """Compare rows that are padded, join, leave and are cut back with passes without a cache."""
    expected = exact(cases()[path])["logits"]
    np.testing.assert_allclose(expected, alone(cases()[path]), rtol=0, atol=1e-12 * np.nanmax(np.abs(expected)))


def test_at_least_60_mistakes_are_caught():
    assert len({name for measured in recorded().values() for name in measured.catches}) >= 60
