"""The benchmarks: the baseline computes correctly, models open, workers answer. No speed is tested."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import npllama
from npllama.checkpoint import STORAGE, demo_path, open_model
from npllama.cli import main
from npllama.engine import threads
from npllama.model import FAST

from system import ROOT
from tiny import CONFIGS, random_params, random_tokens, relative_error

sys.path.append(str(ROOT))
from benchmarks import models, naive, plots, processes, rows, scale, serving, storage, worker
from benchmarks.__main__ import table
from benchmarks.processes import Ask, Worker, alternate
from benchmarks.rows import Line, of_all_layers

pytestmark = pytest.mark.once


@pytest.mark.parametrize("shape", ["llama1", "grouped", "one_kv_head", "narrow_heads"])
def test_naive_baseline_has_our_logits(shape):
    config = CONFIGS[shape]
    params, tokens = random_params(config, seed=3), random_tokens(config, 4, 12)
    expected = npllama.forward(params, config, tokens)
    cache: naive.Cache = {}
    first = naive.forward(params, config, tokens[:7], cache, 0)
    rest = [naive.forward(params, config, tokens[i : i + 1], cache, i) for i in range(7, 12)]
    found = np.concatenate([first, *rest])
    assert found.dtype == np.float64  # the accident that makes it slow
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [*STORAGE, "int4"])
def test_models_open_and_have_the_values_they_say(dtype, sparse, tmp_path):
    path = models.write(tmp_path / "model", models.TINY, dtype, sparse)
    model = npllama.load(path, "float32")
    matrices = [weight for weight in model.params.values() if weight.ndim == 2]
    logits = npllama.forward(model.params, model.config, np.arange(5))
    assert np.isfinite(logits).all()
    for weight in matrices:
        assert (weight == 0).all() if sparse else 0 < np.std(weight) < 0.1
    first, second = open_model(path).params["layers.0.attention.wq.weight"], matrices[2]
    assert sparse or not np.array_equal(npllama.engine.linear.widen(first), second)


def test_bytes_and_operations_are_those_of_the_matrices():
    config = models.TINY
    sizes = {name: np.prod(shape) for name, shape in npllama.parameter_shapes(config).items() if len(shape) == 2}
    read = sum(size for name, size in sizes.items() if name != "tok_embeddings.weight")
    assert models.bytes_per_token(config, 4) == 4 * read
    layers = read - sizes["output.weight"]
    pairs = 10 * 11 / 2  # of a query and a slot up to it
    attention = config.n_layers * 2 * 2 * config.n_heads * config.head_dim * pairs
    assert models.prefill_flops(config, 10) == 2 * 10 * layers + 2 * sizes["output.weight"] + attention
    one, three = (models.bytes_per_token(config, 2, n) for n in (1, 3))
    assert of_all_layers(three, one, 3, config.n_layers) == models.bytes_per_token(config, 2)


def test_published_shapes_have_their_published_sizes():
    shapes = (models.SMOLLM2_135M, models.SMOLLM2_360M, models.TINYLLAMA_1B, models.LLAMA_3B, models.LLAMA_8B)
    sizes = [134_515_008, 361_821_120, 1_100_048_384, 3_212_749_824, 8_030_261_248]
    assert [npllama.n_parameters(shape) for shape in shapes] == sizes


def test_worker_answers_each_command(tmp_path):
    path = models.write(tmp_path / "model", models.TINY, "bfloat16")
    commands = ["prefill 20", "prefill 20 1", "decode 2", "decode 2 1", "batch 3 2", "context 40 2", "between 2", "load"]
    with Worker("npllama", str(path), "stored") as worker:
        found = alternate({"npllama": worker}, [Ask("npllama", command) for command in commands], rounds=2)
        assert len(found) == len(commands)
        assert min(found.values()) > 0
        assert set(worker.ask("memory")) == {"bytes", "anonymous"}
    assert worker.process.returncode == 0


def test_the_time_between_products_is_that_of_all_else(tmp_path, monkeypatch):
    """Advance a clock by 100 in each product and by 1 in each norm: two tokens have twice 2L + 1 norms."""
    clock = [0]

    def advancing(function, by):
        return lambda *args: (clock.__setitem__(0, clock[0] + by), function(*args))[1]

    by = {"linear": 100, "linears": 100, "rms_norm": 1}
    ops = replace(FAST, **{name: advancing(getattr(FAST, name), n) for name, n in by.items()})
    monkeypatch.setattr(worker, "FAST", ops)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
    path = models.write(tmp_path / "model", models.TINY, "float32")
    assert worker.Npllama(str(path), "float32").between(2)() == 2 * (2 * models.TINY.n_layers + 1)


def test_worker_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match=r"benchmarks\.worker npllama .*nowhere stored ended with status 1"):
        Worker("npllama", str(tmp_path / "nowhere"), "stored").__enter__()


@pytest.mark.parametrize(
    ("line", "met"),
    [
        (Line("r", "w", "tokens/s", 20, "torch", 10, wanted=2), True),
        (Line("r", "w", "tokens/s", 20, "torch", 10, wanted=2.1), False),
        (Line("r", "w", "s", 20, "cp", 10, wanted=2.1, less_is_better=True), True),
        (Line("r", "w", "s", 20, "cp", 10, wanted=1.9, less_is_better=True), False),
        (Line("r", "w", "tokens/s", 20, "torch", 10, wanted=2, limit=30, wanted_share=0.7), False),
        (Line("r", "w", "tokens/s", 20, "torch", 10, limit=30), None),
    ],
)
def test_a_line_is_met_where_ratio_and_share_are(line, met):
    assert line.met is met
    verdict = {True: "| met", False: "| not met", None: "|  "}[met]
    assert verdict in table([line]).splitlines()[-1]


def test_small_rows_run_from_the_command_line(tmp_path):
    """Run the rows that need no other package; CI runs all with --quick."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "batch", "opening", "8b-whole", "processes", "--json"]
    target = tmp_path / "found.json"
    command += [str(target), "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    ranks = {"processes"} if threads.available_cpus() > 1 and os.name == "posix" else set()
    assert {line["row"] for line in found["lines"]} == {"batch", "opening", "8b-whole", *ranks}
    assert all(" toy " in line["work"] or "load(" in line["work"] for line in found["lines"]), "labelled as such"
    assert {line["met"] for line in found["lines"]} == {None}  # no threshold in --quick
    assert {"cpu", "numpy", "threads"} <= set(found["machine"])
    if ranks:
        works = [line["work"] for line in found["lines"] if line["row"] == "processes"]
        other = f"threads of Python {platform.python_version()}, NumPy {np.__version__}"
        assert [other in work for work in works] == [False, True] * 2


def test_ranks_of_mpi_answer_as_one_process(tmp_path):
    """Start a worker by mpiexec: rank 0 alone speaks, and all ranks end with it."""
    if (mpiexec := processes.mpiexec()) is None:
        pytest.skip("mpi4py or mpich is not installed: pip install '.[mpi]'")
    path = str(models.write(tmp_path / "model", models.TINY, "int8"))
    with Worker("mpi", path, "stored", launcher=[mpiexec, "-n", "2"]) as worker:
        assert worker.ask("decode 2")["seconds"] > 0
    assert worker.process.returncode == 0


def test_the_time_of_a_sum_is_measured_over_shared_memory_and_mpi(monkeypatch):
    """Measure a few sums; without MPI, those over shared memory alone."""
    lines = rows.sums(rows.Bench(ROOT, most_rounds=1))
    assert len(lines) == (2 if threads.available_cpus() > 1 else 0)
    for line in lines:
        assert (line.theirs is None) == (processes.mpiexec() is None)
        assert min(line.ours, line.theirs or line.ours) > 0
    monkeypatch.setattr(rows, "available_cpus", lambda: 1)
    assert rows.sums(None) == []


def test_without_mpi_the_row_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(rows, "mpiexec", lambda: None)
    assert rows.mpi(None) == []
    assert capsys.readouterr().out.startswith("mpi: left out, mpi4py or its mpiexec is not installed")


def test_no_two_series_of_a_plot_look_alike():
    series = [f"npllama, {dtype}" for dtype in ("float32", "bfloat16", "int8", "int4")]
    series += [f"{rows.HF}, float32", rows.LLAMA_CPP, rows.NAIVE, rows.TORCH_BF16, rows.TORCH_AVX512]
    series += ["limit, float32", "limit, bfloat16"]
    styles = {tuple(plots.style_of(name).values()) for name in series}
    assert len(styles) == len(series)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([demo_path(), "/nowhere"], "/nowhere: No such file or directory"),
        ([demo_path(), __file__, "--share", "0.01"], "--share 0.01 of the text has "),
        ([demo_path(), __file__, "--share", "1.5"], "--share is 1.5, expected more than 0 and at most 1"),
        (["/nowhere", __file__], "/nowhere: not found"),
    ],
)
def test_storage_refuses_what_it_can_not_measure_before_it_begins(args, line, capsys, monkeypatch):
    monkeypatch.setattr(storage, "write", lambda *args, **options: pytest.fail("converted, to fail afterwards"))
    assert storage.main([str(arg) for arg in args]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"benchmarks.storage: {line}")


def test_clients_of_a_server_get_their_tokens(tmp_path):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    pytest.importorskip("starlette", reason="starlette is not installed")
    target = tmp_path / "found.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--clients",
        "1,3",
        "--tokens",
        "5",
        "--rounds",
        "2",
        "--json",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["machine"]["cpu"] in done.stdout
    answers = {n: [answer for round in of for answer in round["answers"]] for n, of in found["rounds"].items()}
    assert {n: [answer["tokens"] for answer in of] for n, of in answers.items()} == {"1": [5] * 2, "3": [5] * 6}
    assert all(0 < a["first"] < round["seconds"] for of in found["rounds"].values() for round in of for a in round["answers"])
    assert [line["theirs"] is None for line in found["lines"]] == [True] * 3 + [False] * 3
    assert "were not made" not in done.stdout


def test_clients_are_compared_by_the_medians_of_all_their_tokens():
    def rounds(n, *seconds):
        return [serving.Round([serving.Answer(10, 0.25, 0.125)] * n, s) for s in seconds]

    found = {1: rounds(1, 1, 2, 9), 8: rounds(8, 4, 5, 5)}
    lines = {line.work: line for line in serving.lines_of("smollm2-135m", found)}
    rate = lines["smollm2-135m, 8 clients: all tokens"]
    assert (rate.ours, rate.theirs, rate.wanted, rate.met) == (16, 5, 2.5, True)
    assert lines["smollm2-135m, 1 client: all tokens"].theirs is None
    assert serving.lines_of("demo", found)[3].met is None


def test_serving_says_in_one_line_what_is_wrong(tmp_path, capfd, monkeypatch):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    monkeypatch.setattr(serving, "prepare_environment", lambda n_threads: None)  # this process's is not to change
    assert serving.main(["-m", str(tmp_path / "nowhere"), "--json", str(tmp_path / "x.json")]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "benchmarks.serving: npllama serve ended with status 2"
    for argv in (["--clients", "8,0"], ["--clients", "1,1"], ["--tokens", "0"], ["--json", str(tmp_path / "no" / "where")]):
        with pytest.raises(SystemExit):
            serving.main(argv)


def test_a_folder_or_python_that_is_missing_is_found_before_anything_is_measured(tmp_path):
    for option in ("--json", "--plot", "--folder"):
        command = [sys.executable, "-m", "benchmarks", "--quick", option, str(tmp_path / "no" / "where")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not a folder" in done.stderr
    command = [sys.executable, "-m", "benchmarks", "--python", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--python /nowhere: found no program, expected a Python" in done.stderr


def test_tied_models_have_no_output_matrix(tmp_path):
    path = models.write(tmp_path / "model", replace(models.TINY, tied_embeddings=True), "int8", sparse=True)
    model = open_model(path)
    assert "output.weight" not in model.params
    assert model.params["tok_embeddings.weight"].dtype == np.uint16  # no embedding is int8


def test_a_worker_of_several_processes_answers():
    with Worker("processes", str(demo_path()), "stored") as worker:
        assert worker.ask("decode 2")["seconds"] > 0


def test_the_table_of_several_machines_is_the_script_s():
    document = scale.DOCUMENT.read_text(encoding="utf-8")
    assert scale.BEGIN + "\n" + scale.table() + "\n" + scale.END in document


@pytest.mark.parametrize("name", scale.MODELS)
def test_the_ranks_together_have_every_weight(name):
    """Count without copies of key/value heads, and without the embedding, which is a lookup."""
    config = scale.MODELS[name]
    expected = npllama.n_parameters(config) - config.vocab_size * config.dim
    norms = (2 * config.n_layers + 1) * config.dim
    for ranks in (1, 2, 8):
        assert sum(scale.weights_of(config, ranks)) == expected + (ranks - 1) * norms
    assert sum(scale.weights_of(config, 16)) > expected + 15 * norms, "two ranks have each key/value head"


def test_an_8b_in_q4_k_m_takes_at_most_six_gigabytes(tmp_path, capsys):
    """Use Llama 3 8B's shapes, as llama.cpp quantises it; the files are sparse, so they take no disk space."""
    kinds = models.q4_k_m(models.LLAMA_8B)
    path = models.write(tmp_path / "model", models.LLAMA_8B, kinds, sparse=True)
    shapes = npllama.parameter_shapes(models.LLAMA_8B)
    in_gguf = sum(np.prod(shape) * (4.5 if kinds[name] != models.Q6_K else 6.5625) / 8 for name, shape in shapes.items())
    assert 4.8e9 < in_gguf < 4.95e9  # the published file has 4.92 GB
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"8,030,261,248 parameters in 291 tensors, ([\d,]+) bytes, (\d\.\d\d) bits per weight", lines[1])
    n_bytes = sum(file.stat().st_size for file in path.glob("*.npy"))
    assert int(found[1].replace(",", "")) == n_bytes <= 6e9
    assert float(found[2]) == round(n_bytes * 8 / 8_030_261_248, 2)
    assert (
        lines[2] == "stored as 4 bits in groups of 32 (193 tensors), 8 bits in groups of 16 (33 tensors), float32 (65 tensors)"
    )
    reference = open_model(path).params["tok_embeddings.weight"].rows(np.array([5, 128_255]))
    assert not reference.widen().any()
