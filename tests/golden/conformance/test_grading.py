"""Check the verdict on a port: the levels passed, and for each failure the operation, case, purpose and mistake."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from npllama.cli import main
from npllama.golden.conformance import check, checks, run, run_functions
from npllama.golden.conformance.cases import PROFILES, cases
from npllama.golden.conformance.config_files import CONSTANTS
from npllama.golden.conformance.measuring import caught, exact
from npllama.golden.conformance.report import as_dict, page, text
from npllama.golden.conformance.suite import export, recorded
from npllama.golden.mistakes import MISTAKES
from npllama.golden.precision import profile

from commands import fails
from conformance_ports import npllama_functions, torch_functions

EPS_OUTSIDE = """\
import numpy as np

def rms_norm(x, weight, eps):
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * weight

def softmax(x):
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    return y / y.sum(axis=-1, keepdims=True)
"""


BLOCK = "L2/block/grouped"
RIGHT = [(name, precision) for name, precisions in PROFILES.items() for precision in precisions]


@pytest.mark.parametrize(("name", "precision"), RIGHT)
def test_our_own_operations_pass_in_every_precision(name, precision):
    report = run_functions("npllama", npllama_functions(precision), name, ["L1"])
    assert not report.failures, text(report)
    left_out = {"linear_bfloat16", "linear_int8"} if name == "float64" else set()
    assert set(report.missing) == {"rope_half_split", "linear_groups"} | left_out


@pytest.mark.parametrize(("name", "precision"), RIGHT)
def test_our_own_layers_and_models_pass_in_every_precision(name, precision):
    """Grade them with the cache, the loaders and FAST's attention unchanged."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    levels = ["L2", "L3", "L4", "L5"] if precision == PROFILES[name][0] else ["L2", "L3"]
    report = run_functions("npllama", npllama_functions(precision), name, levels)
    assert not report.failures, text(report)
    if importlib.util.find_spec("torch"):  # which reads Meta's form
        assert not report.missing


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_hugging_face_passes(name):
    """Run its operations, blocks, models and its own cache, from our parameters and from the suite's files."""
    import torch

    import hf_conformance

    with torch.no_grad():
        levels = ["L1", "L2", "L3", "L4", "L5"]
        report = run_functions("transformers", hf_conformance.functions(getattr(torch, name)), name, levels)
    assert not report.failures, text(report)
    assert {"attention", "feed_forward", "block", "forward"}.isdisjoint(report.missing)
    assert sum(result.passed for result in report.results) > 60


@pytest.mark.torch
@pytest.mark.parametrize("name", ["float64", "float32"])
def test_torch_passes(name):
    import torch

    report = run_functions("torch", torch_functions(torch), name, ["L1"])
    assert not report.failures, text(report)
    assert sum(result.passed for result in report.results) > 40


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float16-cache", "int8-activations"])
def test_most_mistakes_show_in_coarse_profiles_too(name):
    """Find at least 70 of the 96 that one block catches in float32; those of a few per cent and rounding itself don't show."""
    case, measured = cases()[BLOCK], recorded()[BLOCK]
    limits = {output: of_output[name] for output, of_output in measured.tolerances.items()}
    precision = profile(PROFILES[name][0])
    found = [key for key in measured.catches if caught(case, MISTAKES[key], limits, precision, exact(case))]
    assert len(measured.catches) >= 90
    assert len(found) >= 70, set(measured.catches) - set(found)


def test_a_wrong_function_is_named_with_its_mistake(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(EPS_OUTSIDE)
    reports = [tmp_path / "report.json", tmp_path / "report.html"]
    options = [part for path in reports for part in ("--report", str(path))]
    assert main(["conformance", "run", "--python", str(tmp_path / "mine.py"), "--level", "L1", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("float32: levels passed: none; L1 12 of ")
    assert any(line.startswith("FAILED L1/rms_norm/small_rows: found ") for line in lines)
    assert "  this case tests: mean(x²) below eps, so that its place inside the root shows" in lines
    hints = [line for line in lines if line.startswith("  hint: ")]
    assert set(hints) == {f"  hint: {MISTAKES['eps_outside_root'].sentence}"}
    assert lines[-1].startswith("not run: embed, linear, ")
    content = json.loads(reports[0].read_text(encoding="utf-8"))
    assert not content["passed"]
    assert {case["result"] for case in content["cases"]} == {"passed", "failed", "not run"}
    html = reports[1].read_text(encoding="utf-8")
    assert "eps is added after the square root" in html
    assert "http" not in html


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "attention_heads", "causal_mask"])
def test_each_mistake_of_an_operation_is_named(name):
    """Check that where several predict the same numbers, all of them are named."""
    for mistake in (m for m in MISTAKES.values() if list(m.ops) == [name] and not m.needs):
        wrong = mistake.ops[name]
        if name == "causal_mask":
            report = run_functions("mine", {name: lambda q, s, wrong=wrong: wrong(q, s, np.float32)}, levels=["L1"])
        else:
            report = run_functions("mine", {name: wrong}, levels=["L1"])
        if mistake.name in ("mask_large_number", "mask_lowest_number"):
            assert not report.failures, "such numbers mask as -inf does"
            continue
        assert report.failures, mistake.name
        assert any(mistake.sentence in result.hints for result in report.failures), mistake.name


def test_results_in_files(tmp_path, capsys):
    export(tmp_path / "vectors", ["L1"])
    functions = npllama_functions("float32")
    for path, case in cases().items():
        if case.level != "L1" or case.operation.name not in ("softmax", "rope_rotation"):
            continue
        (tmp_path / "results" / path).mkdir(parents=True)
        found = functions[case.operation.name](*case.arguments.values())
        for name, y in zip(case.operation.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            y.astype("<f4").tofile(tmp_path / "results" / path / f"{name}.f32")
    n = sum(case.level == "L1" for case in cases().values())
    arguments = ["conformance", "check", str(tmp_path / "results"), "--vectors", str(tmp_path / "vectors")]
    assert main(arguments) == 0
    assert "0 failed" not in (line := capsys.readouterr().out.splitlines()[0])
    assert line == f"float32: levels passed: none; L1 7 of {n} cases run, all of them passed"
    assert check(tmp_path / "results", levels=["L1"]).exit_status == 0
    file = tmp_path / "results" / "L1" / "softmax" / "masked" / "y.f32"
    y = np.fromfile(file, "<f4")
    y[7] += 1e-4
    y.tofile(file)
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "FAILED L1/softmax/masked: found " in out
    assert "hint" not in out
    (tmp_path / "results" / "L1" / "rope_rotation" / "long" / "sin.f32").unlink()
    assert main(arguments) == 1
    assert "FAILED L1/rope_rotation/long: there is no output sin" in capsys.readouterr().out


def test_all_passed_and_its_page():
    report = run_functions("npllama", npllama_functions("float32"), levels=["L1"])
    assert report.exit_status == 0
    report.results = [result for result in report.results if result.passed]
    assert report.verdict == "float32: levels passed: L1"
    assert as_dict(report)["passed"]
    assert page(report).count('class="bad"') == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def nothing(): pass", "defines no operation of the suite: expected resolve_config, embed, linear, "),
        ("def broken(", "SyntaxError"),
        ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
        ("raise SystemExit", "mine.py calls exit() when it is loaded, expected functions alone"),
    ],
)
def test_a_file_that_is_unusable(content, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(content)
    assert words in fails(capsys, "conformance", "run", "--python", tmp_path / "mine.py")


def test_what_is_unusable(tmp_path, capsys):
    assert "is missing, expected a folder of results" in fails(capsys, "conformance", "check", tmp_path / "none")
    assert "holds no result of a case: expected" in fails(capsys, "conformance", "check", tmp_path)
    (tmp_path / "mine.py").write_text(EPS_OUTSIDE)
    python = ("conformance", "run", "--python", tmp_path / "mine.py")
    assert "profile is 'int3', expected float64, float32, " in fails(capsys, *python, "--profile", "int3")
    assert "report that ends in .json or .html" in fails(capsys, *python, "--report", tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[0], "its shape is [4, 7], expected [3, 4, 7]"),
        (lambda x: x / 0, "found inf at [0, 0, 0], expected"),
        (lambda x: None, "it returned nothing: is there a `return`?"),
        (lambda x: 1 / 0, "it raised ZeroDivisionError: division by zero"),
        (lambda x: sys.exit(0), "it called exit(), expected a result"),
    ],
)
def test_a_function_that_returns_nonsense_fails(function, words):
    report = run_functions("mine", {"softmax": function})
    first = report.failures[0]
    assert words in first.problem.replace("-inf", "inf")


def test_several_outputs_must_be_there_and_not_done_yet_is_not_run():
    def later(*given):
        raise NotImplementedError

    report = run_functions("mine", {"rope_rotation": lambda p, f: p, "softmax": later})
    assert "it returned ndarray, expected 2 arrays: cos, sin" in report.failures[0].problem
    assert "softmax" in report.missing


def test_a_functions_inputs_are_its_own():
    """Check that a function that writes into its arguments spoils no other case."""

    def softmax(x):
        x -= x.max(axis=-1, keepdims=True)
        np.exp(x, out=x)
        x /= x.sum(axis=-1, keepdims=True)
        return x

    for _ in range(2):
        assert not run_functions("mine", {"softmax": softmax}).failures


def test_the_file_is_run_as_a_script_is(tmp_path):
    (tmp_path / "mine.py").write_text(EPS_OUTSIDE + "\nclass Thing: pass\nassert __file__\n")
    assert len(run(tmp_path / "mine.py").failures) == 8


def test_checks_are_tests_of_ones_own_suite():
    functions = npllama_functions("float32") | {"silu": lambda x: x}
    found = {str(check): check for check in checks({"softmax": functions["softmax"], "silu": functions["silu"]})}
    assert set(found) == {path for path, case in cases().items() if case.operation.name in ("softmax", "silu")}
    found["L1/softmax/large"]()
    with pytest.raises(ValueError, match=r"L1/silu/gate: found .* this case tests: the formula; hint: silu is missing"):
        found["L1/silu/gate"]()
    with pytest.raises(ValueError, match="no function is an operation of the suite"):
        checks({"nothing": functions["silu"]})
    with pytest.raises(ValueError, match="profile is 'int3'"):
        checks(functions, "int3")


@pytest.mark.parametrize("name", ["float64", "float32"])
def test_our_own_configuration_and_sampling_pass(name):
    pytest.importorskip("gguf", reason="gguf is not installed")
    report = run_functions("npllama", npllama_functions(name), name, ["L0", "L7"])
    assert not report.failures, text(report)
    assert not report.missing


def test_constants_may_be_named():
    def resolve_config(path):
        found = npllama_functions("float32")["resolve_config"](path)
        return dict(zip(CONSTANTS, found, strict=True)) | {"rope_scaling": None}

    report = run_functions("mine", {"resolve_config": resolve_config})
    assert not report.failures, text(report)
    report = run_functions("mine", {"resolve_config": lambda path: {"norm_eps": "large"}})
    assert "it returned constants that aren't numbers: could not convert" in report.failures[0].problem


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"norm_eps": 1e-6}, "the config's eps is not read"),  # keras-hub 0.32
        ({"rope_theta": 10000.0, "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0, "original_max_seq_len": 0}, None),
        ({"factor": 0, "low_freq_factor": 0, "high_freq_factor": 0, "original_max_seq_len": 0}, "RoPE's scaling is missing"),
    ],
)
def test_the_bugs_that_released_packages_have_are_caught(change, hint):
    """Catch the issue's three: CTranslate2 lost the scaling, keras-hub eps, mlx-lm θ and scaling."""

    def resolve_config(path):
        found = npllama_functions("float32")["resolve_config"](path)
        return dict(zip(CONSTANTS, found, strict=True)) | change

    failures = {result.case.path: result for result in run_functions("mine", {"resolve_config": resolve_config}).failures}
    hints = failures["L0/resolve_config/hf_llama_3_1_new"].hints
    assert hint is None or any(hint in line for line in hints)
