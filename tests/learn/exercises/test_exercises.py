"""Check the exercises: solutions pass, each mistake gets its own hint, and any failure of a student's file is one line."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from npllama.cli import main
from npllama.golden.mistakes import MISTAKES
from npllama.learn import grading
from npllama.learn.exercises import EXERCISES, find
from npllama.learn.grading import check, file_name, judge, outputs, results, same, start

from system import ROOT, full_disk, hear_signals

NAMES = [exercise.name for exercise in EXERCISES]
WHOLE_NUMBERS = ["byte_pair", "cache_bytes", "draw"]

SOLUTIONS = {
    "softmax": """
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)
    """,
    "rms_norm": """
        return weight * (x * (np.square(x).mean(-1, keepdims=True) + np.float32(eps)) ** np.float32(-0.5))
    """,
    "rope_frequencies": """
        j = np.arange(head_dim // 2)
        return np.exp(-2 * j / head_dim * np.log(theta)).astype(np.float32)
    """,
    "rope": """
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)
        y = np.empty_like(x)
        y[..., 0::2], y[..., 1::2] = z.real, z.imag
        return y
    """,
    "causal_mask": """
        mask = np.zeros((1, len(query_positions), len(slot_positions)), np.float32)
        mask[0][slot_positions[None, :] > query_positions[:, None]] = -np.inf
        return mask
    """,
    "attention_scores": """
        keys = np.repeat(keys, q.shape[1] // keys.shape[0], axis=0)
        return np.einsum("thk,hsk->hts", q, keys) * np.float32(q.shape[-1] ** -0.5) + mask
    """,
    "attention_heads": """
        values = np.repeat(values, weights.shape[0] // values.shape[0], axis=0)
        return np.einsum("hts,hsk->thk", weights, values)
    """,
    "swiglu": """
        return gate * (1 / (1 + np.exp(-gate))) * up
    """,
    "probabilities": """
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        total = 0
        for i in np.argsort(-p):
            if total >= top_p:
                p[i] = 0
            total += p[i]
        return p / p.sum()
    """,
    "cache_update": """
        for t in range(len(k)):
            for g in range(store.shape[0]):
                store[g, length + t] = k[t, g]
        return store[:, :length + len(k)]
    """,
    "linear": """
        return np.einsum("...i,oi->...o", x, weight)
    """,
    "byte_pair": """
        parts = list(ids)
        while True:
            for rank, (left, right) in enumerate(merges):
                place = next((i for i in range(len(parts) - 1) if parts[i] == left and parts[i + 1] == right), None)
                if place is not None:
                    parts[place:place + 2] = [256 + rank]
                    break
            else:
                return np.array(parts)
    """,
    "scaled_rope": """
        frequencies = []
        for j in range(head_dim // 2):
            f = theta ** (-2 * j / head_dim)
            s = (length * f / (2 * np.pi) - low) / (high - low)
            frequencies.append(f if s > 1 else f / factor if s < 0 else (1 - s) * f / factor + s * f)
        return np.array(frequencies, np.float32)
    """,
    "cache_bytes": """
        return (n_kv_heads * head_dim + n_kv_heads * head_dim) * n_layers * n_tokens * n_bytes
    """,
    "round_bfloat16": """
        lower = (x.view(np.uint32) >> 16 << 16).view(np.float32)
        upper = ((x.view(np.uint32) >> 16 << 16) + np.uint32(1 << 16)).view(np.float32)
        to_lower, to_upper = np.abs(x.astype(float) - lower), np.abs(upper.astype(float) - x)
        even = (x.view(np.uint32) >> 16) % 2 == 0
        return np.where((to_lower < to_upper) | (to_lower == to_upper) & even, lower, upper)
    """,
    "relative_error": """
        keep = np.isfinite(candidate) & np.isfinite(reference)
        return np.linalg.norm(candidate[keep] - reference[keep]) / np.linalg.norm(reference[keep])
    """,
    "surprise": """
        total = 0
        for t in range(len(ids) - 1):
            z = logits[t].astype(np.float64)
            total += np.logaddexp.reduce(z) - z[ids[t + 1]]
        return total / (len(ids) - 1)
    """,
    "draw": """
        total = 0
        for i, probability in enumerate(p):
            total += probability
            if total > u:
                return i
    """,
}

# As students write them: exercise, body, words of the hint.
BLUNDERS = [
    ("softmax", "return np.exp(x) / np.exp(x).sum(-1, keepdims=True)", "overflows at large scores"),
    ("softmax", "e = np.exp(x - np.max(x)); return e / e.sum(-1, keepdims=True)", "take each row's own"),
    (
        "rms_norm",
        "x = x - x.mean(-1, keepdims=True); return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight",
        "LayerNorm",
    ),
    ("rms_norm", "return x / (np.sqrt((x ** 2).mean(-1, keepdims=True)) + eps) * weight", "it belongs inside"),
    ("rms_norm", "return x / np.sqrt(x.var(axis=-1, keepdims=True) + eps) * weight", "np.var and np.std subtract the mean"),
    ("rms_norm", "return x / np.sqrt(x.std(-1, keepdims=True) ** 2 + eps) * weight", "np.var and np.std subtract the mean"),
    ("rms_norm", "return x / x.std(axis=-1, keepdims=True) * weight", "centred standard deviation"),
    ("rms_norm", "return x / (x.std(axis=-1, keepdims=True) + eps) * weight", "centred standard deviation"),
    (
        "rms_norm",
        "return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + eps) * weight",
        "LayerNorm by a centred standard deviation",
    ),
    (
        "rms_norm",
        "m = x.mean(-1, keepdims=True); return (x - m) / x.std(-1, keepdims=True) * weight",
        "RMSNorm subtracts no mean",
    ),
    (
        "rope_frequencies",
        "return (1.0 / 10000 ** (np.arange(0, head_dim, 2) / head_dim)).astype('f4')",
        "theta is 10000 whatever",
    ),
    (
        "rope_frequencies",
        "return (1.0 / 5e5 ** (np.arange(0, head_dim, 2) / head_dim)).astype('f4')",
        "theta is 500000 whatever",
    ),
    (
        "rope_frequencies",
        "return np.float32(1) / theta ** (np.arange(head_dim // 2) / head_dim).astype('f4')",
        "the exponent is j/K",
    ),
    (
        "rope",
        """
        half = x.shape[-1] // 2
        swapped = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * np.concatenate([cos, cos], -1) + swapped * np.concatenate([sin, sin], -1)
        """,
        "Hugging Face's layout",
    ),
    (
        "rope",
        """
        y = x.copy()
        y[..., 0::2] = y[..., 0::2] * cos - y[..., 1::2] * sin
        y[..., 1::2] = y[..., 0::2] * sin + y[..., 1::2] * cos
        return y
        """,
        "both need the old x",
    ),
    (
        "causal_mask",
        "return np.triu(np.full((len(query_positions), len(slot_positions)), -np.inf, np.float32), k=1)[None]",
        "a triangle of indices",
    ),
    (
        "causal_mask",
        "return np.where(slot_positions < query_positions[:, None], 0, -np.inf).astype(np.float32)[None]",
        "a token doesn't see itself",
    ),
    (
        "causal_mask",
        "f = np.finfo('f4').min; return np.where(slot_positions <= query_positions[:, None], 0, f).astype('f4')[None]",
        "the lowest finite number",
    ),
    (
        "causal_mask",
        "return np.where(slot_positions > query_positions[:, None], np.float32(np.inf), np.float32(0))[None]",
        "the mask's sign is wrong",
    ),
    (
        "causal_mask",
        "m = 1 - (slot_positions <= query_positions[:, None]).astype('f4'); return (m * -np.inf)[None]",
        "0 times inf is NaN: choose",
    ),
    (
        "causal_mask",
        "return (-np.inf * (query_positions[:, None] >= slot_positions))[None]",
        "visible keys are masked",
    ),
    (
        "attention_scores",
        "return np.einsum('thk,hsk->hts', q, np.repeat(keys, q.shape[1] // len(keys), 0)) / q.shape[-1] + mask",
        "it is the square root",
    ),
    (
        "attention_scores",
        "h = np.arange(q.shape[1]) % len(keys); return q.swapaxes(0, 1) @ keys[h].swapaxes(1, 2) / q.shape[-1] ** 0.5 + mask",
        "np.tile does not",
    ),
    (
        "attention_scores",
        "k = np.repeat(keys, q.shape[1] // len(keys), 0); return (np.einsum('thk,hsk->hts', q, k) + mask) / q.shape[-1] ** 0.5",
        "the mask is scaled too",
    ),
    (
        "attention_scores",
        """
        k = np.repeat(keys, q.shape[1] // len(keys), 0)
        T, S = len(q), k.shape[1]
        future = np.triu(np.full((T, S), -np.inf, np.float32), k=S - T + 1)
        return np.einsum('thk,hsk->hts', q, k) / np.float32(q.shape[-1] ** 0.5) + future
        """,
        "a triangle: add the argument",
    ),
    ("attention_heads", "return weights @ np.repeat(values, len(weights) // len(values), axis=0)", "swap the two axes"),
    ("swiglu", "return gate * up / (1 + np.exp(-up))", "it belongs to the gate"),
    (
        "probabilities",
        """
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        order = np.argsort(p)[::-1]
        p[order[np.cumsum(p[order]) > top_p]] = 0
        return p / p.sum()
        """,
        "the token whose probability crosses",
    ),
    (
        "probabilities",
        """
        p = np.exp(logits.astype(np.float64) - logits.max())
        p /= p.sum()
        order = np.argsort(-p)
        reached = np.cumsum(p[order]) - p[order] >= top_p
        scaled = logits / temperature
        scaled[order[reached]] = -np.inf
        q = np.exp(scaled - scaled.max())
        return q / q.sum()
        """,
        "top-p is applied before the temperature",
    ),
    *(
        (
            "probabilities",
            f"""
            p = np.exp((logits.astype({dtype!r}) - logits.max()) / temperature)
            p /= p.sum()
            order = np.argsort(-p)
            kept = np.cumsum(p[order]) - p[order] <= top_p
            p[order[~kept]] = 0
            return p / p.sum()
            """,
            "one token too many where the sum equals top_p exactly",
        )
        for dtype in ("float32", "float64")
    ),
    (
        "probabilities",
        """
        p = np.exp(logits - logits.max()) / temperature
        p /= p.sum()
        total = 0
        for i in np.argsort(-p):
            p[i] *= total < top_p
            total += p[i]
        return p / p.sum()
        """,
        "the temperature has no effect",
    ),
    ("cache_update", "store[:, :len(k)] = k.swapaxes(0, 1); return store[:, :length + len(k)]", "overwrite the first ones"),
    ("linear", "return (x[..., None, :] * weight).mean(-1)", "averaged"),
    (
        "byte_pair",
        """
        parts, pairs = list(ids), merges.tolist()
        i = 0
        while i < len(parts) - 1:
            if parts[i:i + 2] in pairs:
                parts[i:i + 2] = [256 + pairs.index(parts[i:i + 2])]
                i = -1
            i += 1
        return np.array(parts)
        """,
        "the leftmost pair merges first",
    ),
    (
        "scaled_rope",
        "return (theta ** (-np.arange(0, head_dim, 2) / head_dim) / factor).astype('f4')",
        "all frequencies are divided",
    ),
    ("cache_bytes", "return n_layers * n_kv_heads * head_dim * n_tokens * n_bytes", "twice as much"),
    ("cache_bytes", "return 2 * n_layers * n_heads * head_dim * n_tokens * n_bytes", "not for each query head"),
    ("round_bfloat16", "return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)", "are cut off"),
    ("round_bfloat16", "return x.astype(np.float16).astype(np.float32)", "this is float16"),
    (
        "relative_error",
        "return np.sqrt(np.sum((candidate - reference) ** 2) / np.sum(reference ** 2))",
        "-inf minus -inf is NaN",
    ),
    ("draw", "return int(p.argmax())", "always the most likely"),
    ("draw", "return np.searchsorted(p.cumsum(), u)", "of probability 0 can be drawn"),
    (
        "surprise",
        "z = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True); return -z[range(len(ids)), ids].mean()",
        "row t predicts token t + 1",
    ),
    (
        "surprise",
        "z = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True); return -z[range(len(ids) - 1), ids[1:]].sum()",
        "take their mean",
    ),
    (
        "surprise",
        """
        e = np.exp(logits - logits.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        return -np.log(p[range(len(ids) - 1), ids[1:]]).mean()
        """,
        "log(sum(exp(z - m)))",
    ),
    (
        "cache_update",
        "at = length + (length > 0); store[:, at:at + len(k)] = k.swapaxes(0, 1); return store[:, :at + len(k)]",
        "an empty slot after the prompt",
    ),
    ("cache_update", "store[:, length:length + len(k)] = k.swapaxes(0, 1); return store", "the whole store is returned"),
]


def write(folder, name: str, body: str) -> None:
    """Write a student's file with `body` as the function's body."""
    exercise = find(name)
    lines = [line.strip("\n") for line in body.splitlines() if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    body = "\n".join("    " + line[margin:] for line in lines)
    (folder / file_name(exercise)).write_text(f"import numpy as np\n\n\ndef {name}({exercise.arguments}):\n{body}\n")


def check_body(folder, name: str, body: str) -> grading.Outcome:
    write(folder, name, body)
    return check(folder, find(name))


def test_the_first_ten_lead_from_softmax_to_the_cache():
    """Keep their numbers, which the documentation and people's folders use."""
    assert (NAMES[0], NAMES[9]) == ("softmax", "cache_update")
    assert len(set(NAMES)) == len(NAMES) == 18


def test_each_has_a_file_of_its_name():
    folder = ROOT / "npllama" / "learn" / "exercises"
    assert sorted(path.stem for path in folder.glob("*.py")) == sorted(["__init__", "exercise", *NAMES])


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_real_one_exists(exercise):
    module, *path = exercise.real.split(".")
    found = importlib.import_module(f"npllama.{module}")
    for part in path:
        found = getattr(found, part)
    assert callable(found)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_case_of_probabilities_is_on_the_edge_to_the_bit(dtype):
    """Check the edge: only there does "reach" differ from "exceed", and rounding must not decide it."""
    logits, temperature, top_p = find("probabilities").cases()[-1]
    p = np.exp(logits.astype(dtype) / temperature)
    assert p.dtype == dtype
    assert (p / p.sum()).tolist() == [0.25, 0.5, 0.25]
    assert top_p == 0.5
    assert find("probabilities").reference(logits, temperature, top_p).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_passes(tmp_path, name):
    outcome = check_body(tmp_path, name, SOLUTIONS[name])
    assert outcome.passed, outcome
    assert outcome.line.startswith("ok")
    assert outcome.hint is None


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_its_mistakes_are_all_of_the_list_that_are_in_this_function(exercise):
    """Keep the list's order, since the first of several that explain the same numbers is named."""
    assert exercise.mistakes == tuple(mistake.name for mistake in MISTAKES.values() if mistake.function(exercise.name))
    assert len(exercise.hints) == len(exercise.mistakes) + len(exercise.variants) >= 3


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_every_mistake_is_wrong_and_gets_its_own_hint(exercise):
    for hint, wrong in exercise.hints.items():
        with np.errstate(all="ignore"):
            found = results(exercise, lambda *a, wrong=wrong: wrong(*a, *exercise.rest), grading.Path("x.py"))
            outcome = judge(exercise, found)
        assert not outcome.passed
        assert outcome.hint == hint


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_every_mistake_shows_a_small_failing_input_that_can_be_pasted(exercise):
    for hint, wrong in exercise.hints.items():

        def function(*arguments, wrong=wrong):
            return wrong(*arguments, *exercise.rest)

        with np.errstate(all="ignore"):
            example = grading.counterexample(exercise, function)
        assert example, hint
        call, got, expected = example.splitlines()
        *before, call = call.removeprefix("small failing input: ").split("; ")
        for line, run in ((got, function), (expected, lambda *a: exercise.reference(*a, *exercise.rest))):
            namespace = {"np": np, exercise.name: run}
            exec("\n".join(before), namespace)
            with np.errstate(all="ignore"):
                assert grading.numbers(np.array(eval(call, namespace))) == line.split(maxsplit=1)[1], (hint, example)
        assert len(call) < 160


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_right_function_has_no_failing_input(exercise):
    assert grading.counterexample(exercise, lambda *a: exercise.reference(*a, *exercise.rest)) is None


def test_a_wrong_answer_shows_input_result_and_expected(tmp_path, capsys):
    write(tmp_path, "rms_norm", "return x / (x.std(-1, keepdims=True) + eps) * weight")
    assert main(["exercise", "check", str(tmp_path), "rms_norm"]) == 1
    first, *example, hint = capsys.readouterr().out.splitlines()
    assert first.startswith("rms_norm          case 1 of 2, rms_norm([3, 8], [8], 1e-05): found ")
    assert [line.strip() for line in example] == [
        "small failing input: rms_norm(np.float32([3, 4]), np.float32([1, 1]), 1e-05)",
        "got       [5.99988, 7.99984]",
        "expected  [0.848528, 1.13137]",
    ]
    assert "np.std is the centred standard deviation" in hint


def test_a_function_that_fails_on_large_inputs_alone_shows_no_small_one(tmp_path):
    body = "e = np.exp(x - x.max(-1, keepdims=True)); return e / e.sum(-1, keepdims=True) + (x.size > 16)"
    outcome = check_body(tmp_path, "softmax", body)
    assert not outcome.passed
    assert outcome.example is None


@pytest.mark.parametrize(
    ("name", "body", "example"),
    [
        (  # which fits a small square matrix, and gives other numbers
            "softmax",
            "e = np.exp(x - x.max(-1, keepdims=True)); return e / e.sum(-1)",
            [
                "small failing input: softmax(np.float32([[0, 0], [0, 1]]))",
                "got [[0.5, 0.731059], [0.18394, 0.731059]]",
                "expected [[0.5, 0.5], [0.268941, 0.731059]]",
            ],
        ),
        (
            "draw",
            "return 1 / 0",
            ["small failing input: draw(np.array([0.25, 0.5, 0.25]), 0.1)", "got ZeroDivisionError", "expected 0"],
        ),
        ("linear", "return np.einsum('i,oi->o', x, weight)", ["failing input: case 1 of 3, linear([2, 3, 4], [4, 4])"]),
    ],
)
def test_an_exception_shows_the_input_it_came_from(tmp_path, name, body, example):
    outcome = check_body(tmp_path, name, body)
    assert not outcome.passed
    assert "Error in line 5: " in outcome.line
    assert [" ".join(line.split()) for line in outcome.example.splitlines()] == example


def test_wrong_numbers_say_more_than_a_later_exception(tmp_path):
    outcome = check_body(tmp_path, "linear", "return x @ weight")  # fits the square matrix of the first case
    assert outcome.line.startswith("case 1 of 3, linear([2, 3, 4], [4, 4]): found ")
    assert outcome.hint.endswith("transpose it, weight.T")


def test_of_two_mistakes_the_one_of_the_first_wrong_case_is_named(tmp_path):
    outcome = check_body(tmp_path, "softmax", "return np.exp(x) / np.exp(x).sum()")  # overflows too
    assert outcome.hint.startswith("the maximum and the sum are those of the whole array")
    assert outcome.hint.endswith(" (this explains case 1, not every case)")
    outcome = check_body(tmp_path, "causal_mask", "return np.ones((1, len(query_positions), len(slot_positions)), np.float32)")
    assert outcome.hint is None


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_no_two_mistakes_look_alike(exercise):
    """Check that they differ: else one's hint would be given for the other."""
    functions = [exercise.reference, *exercise.hints.values()]
    for a, b in itertools.combinations([outputs(exercise, function) for function in functions], 2):
        assert not all(map(same, a, b))


@pytest.mark.parametrize(("name", "body", "words"), BLUNDERS)
def test_a_mistake_as_students_write_it_is_recognised(tmp_path, name, body, words):
    outcome = check_body(tmp_path, name, body)
    assert not outcome.passed
    assert outcome.hint is not None, outcome
    assert words in outcome.hint


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_wrong_result_that_is_no_known_mistake_gets_no_hint(exercise):
    step = 3 if exercise.name in WHOLE_NUMBERS else np.float32(0.125)
    for wrong in (lambda *a: exercise.reference(*a) + step, lambda *a: -1 - exercise.reference(*a)):
        outcome = judge(exercise, outputs(exercise, wrong))
        assert not outcome.passed
        assert outcome.hint is None
        assert "case 1" in outcome.line
        assert "expected" in outcome.line


def test_the_place_of_the_largest_difference_is_said(tmp_path):
    body = "y = gate / (1 + np.exp(-gate)) * up; y.flat[2] += 1; y.flat[3] -= 7; return y"
    outcome = check_body(tmp_path, "swiglu", body)
    assert "case 1 of 2, swiglu([3, 8], [3, 8]): found -" in outcome.line
    assert "at [0, 3]" in outcome.line


def test_empty_templates_are_not_done_yet(tmp_path):
    assert len(start(tmp_path)) == len(NAMES)
    for exercise in EXERCISES:
        outcome = check(tmp_path, exercise)
        assert (outcome.passed, outcome.line, outcome.hint) == (False, "not done yet", None)


def test_start_on_a_full_disk_leaves_no_part_of_a_file(tmp_path, capsys):
    start(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    with full_disk(max(map(len, whole.values())) - 1):
        assert main(["exercise", "start", str(tmp_path / "mine")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"npllama exercise: {tmp_path / 'mine'}")
    assert line.endswith(".py: File too large")
    for path in (tmp_path / "mine").iterdir():
        assert path.read_bytes() == whole[path.name]
    start(tmp_path / "mine")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == whole


def test_start_never_overwrites(tmp_path):
    write(tmp_path, "softmax", "return 'my work'")
    before = (tmp_path / "01_softmax.py").read_text()
    assert len(start(tmp_path)) == len(NAMES) - 1
    assert start(tmp_path) == []
    assert (tmp_path / "01_softmax.py").read_text() == before


@pytest.mark.parametrize("name", [name for name in NAMES if not find(name).any_float and name not in WHOLE_NUMBERS])
def test_float64_is_said(tmp_path, name):
    body = SOLUTIONS[name].replace("return ", "return np.float64(1) * np.asarray(").rstrip() + ", np.float64)"
    outcome = check_body(tmp_path, name, body)
    assert not outcome.passed
    assert "float64, expected float32" in outcome.line
    assert "math.sqrt" in outcome.hint


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_as_floats_are_said(tmp_path, name):
    body = SOLUTIONS[name].replace("return ", "return np.float64(1) * (").rstrip()
    outcome = check_body(tmp_path, name, body + ")")
    assert not outcome.passed
    assert outcome.line == "the numbers are right, but they are float64, expected whole numbers"


def test_a_count_is_right_or_wrong(tmp_path):
    """Compare exactly: a relative tolerance would accept a count of a billion that is off by a thousand."""
    outcome = check_body(tmp_path, "cache_bytes", SOLUTIONS["cache_bytes"].rstrip() + " + 1")
    assert not outcome.passed
    assert outcome.line.endswith("found 1073741825, expected 1073741824")


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise NotImplementedError", "not done yet"),
        ("return 1 / 0", "ZeroDivisionError in line 5: division by zero"),
        ("x.foo()", "AttributeError in line 5: 'numpy.ndarray' object has no attribute 'foo'"),
        ("return softmax(x)", "RecursionError in line 5: maximum recursion depth exceeded"),
        ("raise ValueError('two\\n\\x1b[31mlines')", "ValueError in line 5: two \\x1b[31mlines"),
        ("raise ValueError(10**4 * 'long ')", "…"),
        ("exit()", "it called exit() in line 5: return the result instead"),
        ("np.exp(x)", "it returned nothing: is there a `return`?"),
        ("return x.tolist()", "it returned a list, expected an array"),
        ("return (x, x)", "it returned a tuple, expected an array"),
        ("return x[0, 0]", "case 1 of 3, softmax([2, 3, 5]): the result has shape [5], expected [2, 3, 5]"),
        ("return x.sum()", "the result has shape [], expected [2, 3, 5]"),
        ("return x * np.nan", "case 1 of 3, softmax([2, 3, 5]): 30 of 30 numbers are NaN"),
        ("return x + 0j", "the result is complex64, expected float32"),
        ("return x > 0", "expected 0."),
        ("return x.astype(object)", "the result is object, expected float32"),
        ("x -= 1; return x", "it changed its argument"),
        ("return (x", "Python can't read line 5: '(' was never closed"),
        ("return x\n\0", "ource code"),
        ("return x\n  y = 1", "unindent does not match any outer indentation level"),
    ],
)
def test_whatever_goes_wrong_is_one_line(tmp_path, body, line):
    exercise = find("softmax")
    (tmp_path / file_name(exercise)).write_text("import numpy as np\n\n\ndef softmax(x):\n    " + body + "\n")
    outcome = check(tmp_path, exercise)
    assert not outcome.passed
    assert line in outcome.line
    assert len(outcome.line.splitlines()) == 1
    assert len(outcome.line) < 250
    assert outcome.line.isprintable()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "there is no function softmax in 01_softmax.py"),
        (b"softmax = 3", "there is no function softmax in 01_softmax.py"),
        (b"import nothing_of_this_name", "ModuleNotFoundError in line 1: No module named 'nothing_of_this_name'"),
        (b"x = '\xff'", "Python can't read"),
        (b"def softmax():\n    return 1", "TypeError"),
        (b"import sys; sys.exit(3)", "it called exit() in line 1"),
    ],
)
def test_whatever_is_wrong_with_the_file_is_one_line(tmp_path, content, line):
    (tmp_path / "01_softmax.py").write_bytes(content)
    outcome = check(tmp_path, find("softmax"))
    assert not outcome.passed
    assert line in outcome.line
    assert len(outcome.line.splitlines()) == 1


def test_a_change_within_a_second_counts(tmp_path):
    """Read the source again: a compiled copy would pass for a file of the same size and second."""
    for body, passed in (("return -np.exp(x)", False), (SOLUTIONS["softmax"], True), ("return +np.exp(x)", False)):
        assert check_body(tmp_path, "softmax", body).passed is passed
    assert not (tmp_path / "__pycache__").exists()


def test_the_student_s_numpy_settings_do_not_stay(tmp_path):
    before = np.geterr()
    check_body(tmp_path, "softmax", "np.seterr(all='raise'); return np.exp(x)")
    assert np.geterr() == before


# ----------------------------------------------------------------------------------------------------------- the command line


def test_list_names_them_in_order(capsys):
    assert main(["exercise", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == NAMES


def test_from_start_to_all_done(tmp_path, capsys):
    folder = tmp_path / "my" / "exercises"
    assert main(["exercise", "start", str(folder)]) == 0
    assert main(["exercise", "check", str(folder)]) == 1
    assert capsys.readouterr().out.endswith(f"0 of {len(NAMES)} done\n")
    for name in NAMES:
        write(folder, name, SOLUTIONS[name])
    assert main(["exercise", "check", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("{0} of {0} done\n".format(len(NAMES)))
    write(folder, "softmax", "return np.exp(x) / np.exp(x).sum(-1, keepdims=True)")
    assert main(["exercise", "check", str(folder), "rms_norm"]) == 0
    assert main(["exercise", "check", str(folder), "softmax"]) == 1
    assert "hint: exp overflows" in capsys.readouterr().out
    (folder / "02_rms_norm.py").unlink()
    assert main(["exercise", "check", str(folder)]) == 1
    assert "02_rms_norm.py is missing" in capsys.readouterr().out


def test_inside_the_folder_a_name_is_enough(tmp_path, capsys, monkeypatch):
    write(tmp_path, "softmax", SOLUTIONS["softmax"])
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", "check", "softmax"]) == 0
    assert main(["exercise", "check"]) == 1


def test_several_names_at_once(tmp_path, capsys, monkeypatch):
    for name in ("softmax", "swiglu"):
        write(tmp_path, name, SOLUTIONS[name])
    assert main(["exercise", "check", str(tmp_path), "softmax", "swiglu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["softmax", "swiglu", "2"]
    assert out[-1] == "2 of 2 done"
    assert main(["exercise", "check", str(tmp_path), "swiglu", "rope"]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 done\n")
    monkeypatch.chdir(tmp_path)
    assert main(["exercise", "check", "softmax", "swiglu"]) == 0
    assert main(["exercise", "check", "softmax", "swigloo"]) == 2
    assert "there is no exercise 'swigloo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["check", "."], "holds no exercises"),
        (["check", "nowhere"], "holds no exercises"),
        (["check", ".", "softmaxx"], "there is no exercise 'softmaxx'"),
        (["start", "a file"], "File exists"),
    ],
)
def test_bad_usage_is_one_line_and_2(tmp_path, capsys, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    assert main(["exercise", *arguments]) == 2
    out, err = capsys.readouterr()
    assert line in err
    assert len((out + err).splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="no POSIX signals")
def test_ctrl_c_ends_an_endless_loop_and_names_its_line(tmp_path):
    write(tmp_path, "softmax", "while True:\n    x = x + 1\n    print('in it', flush=True)")
    command = [sys.executable, "-m", "npllama", "exercise", "check", str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_signals) as process:
        assert process.stdout.readline() == "in it\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines() == [err.strip()]
    assert "softmax interrupted in line " in err
    assert int(err.split("in line ")[1].split(":")[0]) in (5, 6, 7)
