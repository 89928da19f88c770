"""Check that each mistake changes a right pass, first where it says, and that compare names it by its sentence."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from npllama import Config
from npllama.activations import TABLE
from npllama.checkpoint import Model
from npllama.golden.compare import compare, hints
from npllama.golden.compare.names import place
from npllama.golden.compare.noise import measure_noise
from npllama.golden.mistakes import MISTAKES, NEEDS, Port, Taken
from npllama.golden.precision import Precision
from npllama.golden.trace import record, write_trace
from npllama.learn.exercises import find
from npllama.learn.grading import outputs

import broken_ports
import tiny

STEPS = [[3, 4], [5, 6]]
IN_A_PASS = [name for name, m in MISTAKES.items() if m.at and m.needs not in ("finite mask", "error")]
# Whose prediction is another's too, which comes first: mistake -> words of the hint. None: not a number, and so no hint.
NAMED_OTHERWISE = {
    "no_eps": "eps = 0, and 1e-05 was expected",
    "eps": "eps = 1e-06, and 1e-05 was expected",
    "no_last_norm": MISTAKES["no_norm"].sentence,
    "w1_w3_exchanged": MISTAKES["gate_from_up"].sentence,
    "previous_layers_weights": MISTAKES["layer_0_everywhere"].sentence,  # in layer 1, where it shows, they are the same
    "keys_unrotated": MISTAKES["no_rope"].sentence,
    "exponent_j": "θ = 100, and 10000 was expected",
    "exponent_of_pairs": "θ = 100000000, and 10000 was expected",
    "theta_10000": "θ = 10000, and 20000 was expected",
    "theta_500000": "θ = 500000, and 10000 was expected",
    "scale_factor": "scale factor: 8, and 32 was expected",
    "mask_axes_exchanged": MISTAKES["mask_reversed"].sentence,  # which it is, in a prompt
    "mask_of_its_own": MISTAKES["mask_of_slots"].sentence,
    "padding_as_tokens": MISTAKES["padding_counted"].sentence,  # which it is, too
    "keys_and_values_tiled": MISTAKES["keys_tiled"].sentence,  # the scores show nothing of the values
    "keys_and_values_of_the_last_head": MISTAKES["keys_of_the_last_head"].sentence,
    "keys_and_values_of_head_0": MISTAKES["keys_of_head_0"].sentence,
    "bfloat16": "every number is exact in bfloat16",
    "float16": "every number is exact in float16",
    "mask_wrong_sign": None,
    "mask_multiplied": None,
    "mask_multiplied_reversed": None,
    "softmax_overflow": None,
    "softmax_maximum_of_all": None,
    "softmax_first_axis": None,
    "silu_overflow": None,
}
EQUAL_TO_COMPARE = ("mask_large_number", "mask_lowest_number")  # such numbers mask as -inf does


@functools.cache
def model_for(name: str) -> Model:
    """Return a tiny model in which the mistake can show."""
    mistake = MISTAKES[name]
    others = ({}, {"n_kv_heads": 6}, {"rope_theta": 20000.0}, {"head_dim": 8})
    model = next(m for m in (broken_ports.tiny_model(**changes) for changes in others) if mistake.applies(m.config))
    if mistake.needs == "large":
        large = ("wq.weight", "wk.weight", "w1.weight")
        params = {n: x * np.float32(40) if n.endswith(large) else x for n, x in model.params.items()}
        model = dataclasses.replace(model, params=params)
    return model


def tokens_for(name: str) -> tuple[np.ndarray, list]:
    """Return a prompt and steps; a batch whose second row is padded, for what needs padding."""
    tokens = tiny.random_tokens(broken_ports.CONFIG, 2, (2, 12))
    tokens[1, :4] = -1
    steps = [] if name in ("mask_axes_exchanged", "scores_transposed") else STEPS  # where T is not S their shapes don't fit
    return (tokens, steps) if MISTAKES[name].needs == "padding" else (tokens[0], [step[0] for step in steps])


def right_and_wrong(name: str) -> tuple[dict, dict]:
    model, (tokens, steps) = model_for(name), tokens_for(name)
    return record(model, tokens, steps), record(model, tokens, steps, Port(name))


def differs(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two float32 arrays are further apart than rounding takes any activation of a tiny model, a hundredfold."""
    if not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return True
    both = np.isfinite(expected)
    return bool(np.max(np.abs(found[both] - expected[both])) > 1e-4 * np.max(np.abs(expected[both])))


@pytest.mark.parametrize("name", IN_A_PASS)
@np.errstate(all="ignore")
def test_a_mistake_shows_first_where_it_says(name):
    right, wrong = right_and_wrong(name)
    first = next((n for n in right if n in wrong and not np.array_equal(right[n], wrong[n], equal_nan=True)), None)
    assert place(first).kind in ({"norm"} if name == "last_layer_missing" else MISTAKES[name].at)
    assert any(differs(wrong[n], right[n]) for n in right if n in wrong and (place(n).kind in MISTAKES[name].at))
    assert place(first).step is not None or MISTAKES[name].needs != "decode"


def test_most_change_the_logits():
    """Check all but those that later operations undo: a rotation common to queries and keys, another number for -inf."""
    same = set()
    for name in IN_A_PASS:
        with np.errstate(all="ignore"):
            right, wrong = right_and_wrong(name)
        if not any(differs(wrong[n], right[n]) for n in right if place(n).kind == "logits"):
            same.add(name)
    assert same == {
        *("position_1_late", "position_1_early", "position_2_late", "position_2_early", "rope_apart"),
        *("mask_large_number", "mask_lowest_number"),
    }
    assert len(IN_A_PASS) - len(same) >= 60


@pytest.mark.parametrize("name", [name for name, m in MISTAKES.items() if m.needs == "error"])
def test_a_shape_that_does_not_fit_raises(name):
    model = broken_ports.tiny_model()
    with pytest.raises(ValueError, match=r"shape|dimension|size"):
        record(model, *tokens_for(name), Port(name))


@pytest.mark.parametrize("name", [name for name, m in MISTAKES.items() if m.needs == "finite mask"])
def test_what_forward_has_no_mask_for_shows_in_the_exercise(name):
    [operation] = MISTAKES[name].ops
    exercise = find(operation)
    right, wrong = outputs(exercise, exercise.reference), outputs(exercise, MISTAKES[name].ops[operation])
    assert any(differs(w, r) for w, r in zip(wrong, right, strict=True))


def test_without_a_mistake_a_port_is_right_to_the_bit():
    model, tokens = broken_ports.tiny_model(), tokens_for("padding_counted")
    right, port = record(model, *tokens), record(model, *tokens, Port())
    assert right.keys() == port.keys()
    assert all(np.array_equal(port[name], right[name]) for name in right)


def test_several_mistakes_at_once():
    """Combine Hugging Face's order of rows with its rotation, which is right again; each run keeps its own cache."""
    model, (tokens, steps) = broken_ports.tiny_model(), tokens_for("half_split")
    right = record(model, tokens, steps)
    port = Port("rows_in_halves", "half_split")
    for _ in range(2):
        assert not differs(record(model, tokens, steps, port)["step.1/logits"], right["step.1/logits"])
    port = Port("rows_in_halves", "half_split", "cache_over_the_last")
    runs = [record(model, tokens, steps, port)["step.1/logits"] for _ in range(2)]
    assert differs(runs[0], right["step.1/logits"])
    assert np.array_equal(*runs)


def test_the_list_is_sound():
    assert {m.needs for m in MISTAKES.values()} == set(NEEDS)
    assert len({m.sentence for m in MISTAKES.values()}) == len(MISTAKES)
    for name, mistake in MISTAKES.items():
        assert name.isidentifier(), name
        assert set(mistake.at) <= TABLE.keys(), name
        assert mistake.at or mistake.sampling or mistake.outside, name
        assert not mistake.sentence.endswith("."), name
        assert "turn" not in mistake.sentence.split(), "RoPE rotates"


def test_a_weight_taken_for_another_is_that_alone():
    model = broken_ports.tiny_model()
    for weight, other in (("wv", "wk"), ("attention_norm", "ffn_norm"), ("output", "tok_embeddings")):
        changed = [n for n, x in model.params.items() if Taken(weight, other)(n, model.params, model.config) is not x]
        assert changed == [n for n in model.params if n.removesuffix(".weight").rpartition(".")[2] == weight]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Write a float64 trace of a mistake's model and tokens, and the noise floor there; the same for many mistakes."""

    @functools.cache
    def made(needs: str, config: Config, name: str):
        path = tmp_path_factory.mktemp("mistakes") / "reference"
        trace = write_trace(model_for(name), *tokens_for(name)[:1], path, tokens_for(name)[1], Precision("float64"))
        return path, measure_noise(model_for(name), *tokens_for(name), "float32", trace.keys())

    @functools.cache
    def representative(needs: str, config: Config, n_steps: int) -> str:
        return next(n for n in IN_A_PASS if kind_of(n) == (needs, config, n_steps))

    def kind_of(name: str) -> tuple[str, Config, int]:
        needs = MISTAKES[name].needs
        return needs if needs in ("padding", "large") else "", model_for(name).config, len(tokens_for(name)[1])

    return lambda name: made(*kind_of(name)[:2], representative(*kind_of(name)))


@pytest.mark.once  # a second for each mistake; with every NumPy, test_it_is_named_whatever_is_recorded names ten
@pytest.mark.parametrize("name", IN_A_PASS)
@np.errstate(all="ignore")
def test_compare_names_it(name, reference, tmp_path):
    """Name it first, unless another is as true of these numbers; all that are as true follow."""
    path, noise = reference(name)
    model, (tokens, steps) = model_for(name), tokens_for(name)
    write_trace(model, tokens, tmp_path / "mine", steps, Port(name))
    found = compare(path, tmp_path / "mine", model=model, noise=noise, partial=name == "last_layer_missing")
    if name in EQUAL_TO_COMPARE:
        assert found.equal
        return
    expected = NAMED_OTHERWISE.get(name, MISTAKES[name].sentence)
    assert bool(found.hints) == (expected is not None), found.hints
    assert expected is None or expected in found.hints[0]
    assert all(hint.startswith("or: ") for hint in found.hints[1:]), found.hints  # others that predict the same numbers
    found_out = expected is None or "was expected" in expected or "every number" in expected  # a constant, or rounding
    assert found_out or any(MISTAKES[name].sentence in hint for hint in found.hints), found.hints


def recorded_by(form, arrays):
    """Keep what a port records: everything, all but the inside of attention, or the logits alone."""
    if form == "logits":
        return {n: x for n, x in arrays.items() if place(n).kind == "logits"}
    return arrays if form == "everything" else fused("q_rope k_rope scores weights heads", arrays)


def hints_of(name, form, reference, folder):
    """Return the hints on a port with a mistake that records part of its activations."""
    path, noise = reference(name)
    model, (tokens, steps) = model_for(name), tokens_for(name)
    np.savez(folder / "mine.npz", **recorded_by(form, record(model, tokens, steps, Port(name))))
    return compare(path, folder / "mine.npz", model=model, noise=noise, partial=True).hints


@pytest.mark.parametrize("form", ["everything", "fused", "logits"])
@pytest.mark.parametrize(
    "name",
    [
        *("eps_outside_root", "layer_0_everywhere", "cache_over_the_last", "padding_as_tokens", "keys_unrotated_in_decode"),
        *("angles_in_bfloat16", "no_scaling", "half_split", "padding_counted", "positions_restart"),
    ],
)
def test_it_is_named_whatever_is_recorded(name, form, reference, run_once, tmp_path):
    given = hints_of(name, form, reference, tmp_path)
    assert any(MISTAKES[name].sentence in hint for hint in given), given
    assert all(hint.startswith("or: ") for hint in given[1:]), given


# All of them take half a minute; in every run, those that are tried on logits, and a few of the others.
FROM_LOGITS = [
    pytest.param(name, marks=() if name in hints.RERUN or i % 5 == 0 else pytest.mark.slow) for i, name in enumerate(IN_A_PASS)
]


@pytest.mark.once
@pytest.mark.parametrize("name", FROM_LOGITS)
@np.errstate(all="ignore")
def test_no_hint_from_the_logits_alone_is_definite_and_false(name, reference, run_once, tmp_path):
    """Check that where causes are named, the mistake is among them."""
    given = hints_of(name, "logits", reference, tmp_path)
    if given and not given[0].endswith("?"):
        assert any(MISTAKES[name].sentence in hint for hint in given), given


def fused(unrecorded, arrays):
    """Keep the activations that a port with fused kernels records."""
    return {n: x for n, x in arrays.items() if place(n).kind.removeprefix("attention.") not in unrecorded}


@pytest.mark.parametrize(
    ("name", "unrecorded", "where"),
    [
        ("no_scaling", "q_rope k_rope scores weights heads", "attention.out"),
        ("no_mask", "scores weights", "attention.heads"),
        ("keys_and_values_tiled", "q_rope k_rope scores weights heads", "attention.out"),
        ("eps_outside_root", "attention_norm q k v", "attention.q_rope"),
        ("gelu_erf", "feed_forward.gate feed_forward.up feed_forward.act", "feed_forward.out"),
        ("gate_up_exchanged", "feed_forward.gate feed_forward.up feed_forward.act", "feed_forward.out"),
        ("w1_w3_exchanged", "feed_forward.gate feed_forward.up", "feed_forward.act"),
    ],
)
def test_it_is_named_through_operations_that_are_not_recorded(name, unrecorded, where, reference, tmp_path):
    path, noise = reference(name)
    model, (tokens, steps) = model_for(name), tokens_for(name)
    mine = record(model, tokens, steps, Port(name))
    np.savez(tmp_path / "mine.npz", **fused(unrecorded.split(), mine))
    found = compare(path, tmp_path / "mine.npz", model=model, noise=noise, partial=True)
    assert place(found.first.name).kind == where
    assert found.hints[0] == MISTAKES["gate_up_exchanged" if name == "w1_w3_exchanged" else name].sentence
    assert all(hint.startswith("or: ") for hint in found.hints[1:]), found.hints
