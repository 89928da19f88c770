"""Run ranks as processes of this machine: their results, and what follows when one is killed, interrupted or fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama import KVCache, checkpoint, forward, generate, parameter_shapes
from npllama.checkpoint import Model, demo_path
from npllama.cli import main
from npllama.engine import threads
from npllama.engine.ranks import leading, local, shares
from npllama.engine.ranks.groups import RankError

import tiny
from commands import COMMAND
from system import hear_signals, needs_proc, workers_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not a POSIX system: ranks can't be processes")
CLOSE = {"rtol": 0, "atol": 1e-5}
WITHIN = 60  # seconds after which something hangs


@pytest.fixture(autouse=True)
def own_threads():
    """Restore this process's number of threads."""
    before = threads.n_threads()
    yield
    threads.set_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write three tiny models that differ in shape and storage."""
    path = tmp_path_factory.mktemp("models")
    for name, dtype in (("grouped", "bfloat16"), ("one_kv_head", "float32"), ("odd_ffn", "int8")):
        config = tiny.CONFIGS[name]
        dtypes = {
            key: dtype if dtype != "int8" or checkpoint.takes_int8(key) else "float32" for key in parameter_shapes(config)
        }
        with checkpoint.create(path / name, config, dtypes, {"kind": "test"}) as writer:
            for key, array in tiny.random_params(config, seed=1).items():
                writer.add(key, array)
    return path


def group_of(model: Model) -> local.Workers:
    return model.params.lead.__self__.group


@pytest.fixture(scope="module")
def demo():
    """Return the embedded model on two processes, for tests that leave it unchanged."""
    before = threads.n_threads()
    model = npllama.load(processes=2)
    threads.set_threads(before)
    yield model
    group_of(model).close()


def gone(pids: list[int]) -> bool:
    """Return whether all processes have ended within the time; zombies have."""
    until = time.monotonic() + WITHIN
    while time.monotonic() < until:
        alive = [
            pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
        ]
        if not alive:
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------------------ what they compute


@pytest.mark.parametrize(
    ("name", "size", "dtype"), [("grouped", 2, "stored"), ("one_kv_head", 4, "float32"), ("odd_ffn", 3, "stored")]
)
def test_two_hundred_tokens_are_those_of_one_process(folder, name, size, dtype):
    """Use more processes than this machine may have processors, on three models, in three storages."""
    one, several = npllama.load(folder / name, dtype), npllama.load(folder / name, dtype, processes=size)
    prompt = tiny.random_tokens(one.config, 6, 11)
    assert several.config == one.config
    try:
        expected = list(generate(one, prompt, 200))
        assert list(generate(several, prompt, 200)) == expected
        found = forward(several.params, several.config, expected)
        np.testing.assert_allclose(found, forward(one.params, one.config, expected), **CLOSE)
    finally:
        group_of(several).close()


def test_a_tied_embedding_in_memory(demo):
    """Look rows up in the whole matrix, and gather the logits from parts of it."""
    one = npllama.load()
    tokens = [[1, 2, 3, 4], [-1, -1, 5, 6]]
    found, expected = (forward(m.params, m.config, tokens, KVCache(m.config, (2,))) for m in (demo, one))
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-4)  # logits are about ten times those of tiny models
    np.testing.assert_allclose(found[1, 2:], expected[1, 2:], rtol=0, atol=1e-4)


def test_sums_of_more_numbers_than_a_slot_holds(monkeypatch, folder):
    """Sum a prompt's rows in several pieces."""
    monkeypatch.setattr(local, "SLOT", 1 << 12)
    monkeypatch.setattr(local, "WORKER", f"import {local.__name__} as local; local.SLOT = 1 << 12; {local.WORKER}")
    one, several = (npllama.load(folder / "one_kv_head", processes=n) for n in (1, 2))
    tokens = tiny.random_tokens(one.config, 6, 50)
    try:
        found = forward(several.params, several.config, tokens)
        np.testing.assert_allclose(found, forward(one.params, one.config, tokens), **CLOSE)
        whole = npllama.record(several, tokens)["layers.0.feed_forward.act"]
        np.testing.assert_allclose(whole, npllama.record(one, tokens)["layers.0.feed_forward.act"], **CLOSE)
    finally:
        group_of(several).close()


def test_what_a_tap_returns_may_have_another_dtype(demo):
    def seen_and_found(model):
        seen = []

        def tap(name, x):
            seen.append((name, x.dtype.name))
            return x.astype(np.float64)

        return seen, forward(model.params, model.config, [1, 2, 3], tap=tap)

    (expected, _), (seen, found) = seen_and_found(npllama.load()), seen_and_found(demo)
    assert seen == expected
    assert {dtype for _, dtype in seen} == {"float32", "float64"}
    np.testing.assert_allclose(found, forward(demo.params, demo.config, [1, 2, 3]), rtol=0, atol=1e-4)


def test_more_processes_than_heads_are_refused_before_any_is_started(monkeypatch):
    monkeypatch.setattr(local, "Workers", None)
    with pytest.raises(ValueError, match="7 ranks, but the model has 6 query heads: expected 1 to 6 ranks"):
        npllama.load(processes=7)
    with pytest.raises(ValueError, match="the number of processes is 0, expected 1 or more"):
        npllama.load(processes=0)


def test_the_processors_are_shared_out(monkeypatch):
    monkeypatch.setattr(local, "available_cpus", lambda: 8)
    assert [local.threads_of_each(size, 8) for size in (2, 3, 8, 9)] == [4, 2, 1, 1]
    assert local.threads_of_each(2, 1) == 1


def test_a_part_of_the_parameters_alone_is_refused(demo):
    """Refuse a copy of the mapping: only the mapping itself has the other ranks compute."""
    with pytest.raises(RankError, match="expected the model's own mapping"):
        forward(dict(demo.params), shares.own_config(demo.config, shares.shares(demo.config, 2)[0]), [1, 2])
    forward(demo.params, demo.config, [1, 2])


# ----------------------------------------------------------------------------------------------------------- what goes wrong


def test_an_interrupted_pass_leaves_all_ranks_as_they_were(demo):
    """Interrupt at several activations of a pass; the next pass is right."""
    cache, expected = KVCache(demo.config), None
    forward(demo.params, demo.config, [1, 2, 3], cache)
    names = ["tok_embeddings", "layers.0.attention.scores", "layers.1.out", "logits"]

    for where in names:

        def tap(name, x, where=where):
            if name == where:
                raise KeyboardInterrupt
            return x

        with pytest.raises(KeyboardInterrupt):
            forward(demo.params, demo.config, [4, 5], cache, tap=tap)
        assert cache.length == 3
        found = forward(demo.params, demo.config, [6], cache)
        cache.truncate(3)
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)


def test_interrupts_at_any_moment(demo):
    """Interrupt after any time: a pass is complete, or raises KeyboardInterrupt and changes nothing."""
    cache, before = KVCache(demo.config), signal.signal(signal.SIGINT, signal.default_int_handler)
    expected = forward(demo.params, demo.config, [1, 2, 3, 4], cache)
    interrupted = 0
    try:
        for i in range(40):
            cache.truncate(0)
            timer = threading.Timer(i * 2e-4, signal.raise_signal, [signal.SIGINT])
            try:
                timer.start()
                while True:
                    forward(demo.params, demo.config, [1, 2, 3, 4], cache)
                    cache.truncate(0)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            cache.truncate(0)
            np.testing.assert_array_equal(forward(demo.params, demo.config, [1, 2, 3, 4], cache), expected)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == 40


def test_an_exception_on_another_rank_is_raised_with_its_number(demo, monkeypatch):
    monkeypatch.setitem(leading.OPS, "MINE", leading.PLAIN)  # which only rank 0 knows
    monkeypatch.setattr(leading, "operations_name", lambda ops, tap, arithmetic: "MINE")
    with pytest.raises(RankError, match="rank 1: KeyError: 'MINE'"):
        forward(demo.params, demo.config, [1, 2])
    monkeypatch.undo()
    assert forward(demo.params, demo.config, [1, 2]).shape == (2, demo.config.vocab_size)


def test_a_report_is_read_even_if_it_arrives_with_one_of_an_abandoned_pass(demo, monkeypatch):
    """Let rank 1 fail in two passes, of which rank 0 abandons the first before it reads why, and is late in the second."""

    def interrupt(name, x):
        time.sleep(0.3)
        raise KeyboardInterrupt

    def wait(name, x):
        time.sleep(0.3 if name == "tok_embeddings" else 0)
        return x

    monkeypatch.setitem(leading.OPS, "MINE", leading.PLAIN)  # which only rank 0 knows
    monkeypatch.setattr(leading, "operations_name", lambda ops, tap, arithmetic: "MINE")
    with pytest.raises(KeyboardInterrupt):
        forward(demo.params, demo.config, [1, 2], tap=interrupt)
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("rank 0 waits for a rank that has reported"))
    signal.alarm(20)
    try:
        with pytest.raises(RankError, match="rank 1: KeyError: 'MINE'"):
            forward(demo.params, demo.config, [1, 2], tap=wait)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    monkeypatch.undo()
    assert forward(demo.params, demo.config, [1, 2]).shape == (2, demo.config.vocab_size)


@pytest.mark.parametrize("when", ["within a pass", "between two passes"])
def test_a_killed_rank_is_said_and_ends_the_others(when):
    model = npllama.load(processes=3)
    processes = group_of(model)._processes

    def kill(name, x):
        if name == "layers.1.out":
            processes[0].kill()
        return x

    if when == "between two passes":
        forward(model.params, model.config, [1, 2, 3])
        processes[0].kill()
        processes[0].wait()
    with pytest.raises(RankError, match=r"rank 1 of 3 \(process \d+\) was ended by SIGKILL") as error:
        forward(model.params, model.config, [1, 2, 3], tap=kill)
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RankError) as again:
        forward(model.params, model.config, [1, 2, 3])
    assert str(again.value) == str(error.value)


def test_a_rank_that_can_t_load_says_why(monkeypatch, folder):
    def order(size, order, make=local.Workers):
        return make(size, {**order, "path": str(folder / "nothing")})

    monkeypatch.setattr(local, "Workers", order)
    with pytest.raises(RankError, match=r"rank 1: .*nothing: not found"):
        npllama.load(processes=2)


@needs_proc
def test_the_processes_end_with_the_model():
    model = npllama.load(processes=2)
    pids = [process.pid for process in group_of(model)._processes]
    assert set(pids) <= set(workers_of(os.getpid()))
    del model
    assert gone(pids)


ENDLESS = """
import sys, npllama
model = npllama.load(processes=2)
while True:
    for token in npllama.generate(model, [1], 100):
        print(token, flush=True)
"""


@pytest.fixture
def generating():
    """Start a program that generates with two processes; give it and the id of its other rank."""
    code = [sys.executable, "-c", ENDLESS]
    process = subprocess.Popen(
        code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_signals
    )
    for _ in range(3):
        process.stdout.readline()
    yield process, *workers_of(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.communicate()


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_rank_0_ends(generating, number):
    """End rank 0 in several ways: no process is left, and nothing in /dev/shm, as their shared memory has no name."""
    process, worker = generating
    for pid in (process.pid, worker):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/memfd:" in maps
        assert "/dev/shm" not in maps
    process.send_signal(number)
    process.wait(WITHIN)
    assert gone([worker])


@needs_proc
def test_the_command_says_a_killed_rank_in_one_line():
    command = [*COMMAND, "generate", "Once", "--processes", "2", "-n", "400", "--temperature", "1", "--no-echo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(4)
    [worker] = workers_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=WITHIN)
    assert process.returncode == 2
    lines = [line for line in error.splitlines() if "tokens/s" not in line]
    assert len(lines) == 1
    assert f"rank 1 of 2 (process {worker}) was ended by SIGKILL" in lines[0]


@pytest.mark.parametrize("command", [["generate", "-"], ["generate", "--prompts", "-"], ["chat"], ["chat", "-"]])
def test_a_rank_that_is_killed_during_a_wait_for_input_ends_the_command(command, monkeypatch, capsys):
    started = []

    class Input:
        """Kill the other rank, then wait."""

        def read(self) -> bytes:
            started[-1].kill()
            time.sleep(WITHIN)
            pytest.fail("the wait went on")

        buffer, readline, isatty = property(lambda self: self), read, lambda self: False

    def start(*args, start=local.start_process):
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(local, "start_process", start)
    monkeypatch.setattr("sys.stdin", Input())
    before = signal.getsignal(signal.SIGALRM)
    assert main([*command, "--processes", "2"]) == 2
    line = f"npllama {command[0]}: rank 1 of 2 (process {started[-1].pid}) was ended by SIGKILL"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@needs_proc
def test_a_rank_that_is_killed_ends_a_chat_that_waits_at_a_pipe():
    command = [*COMMAND, "chat", "--processes", "2", "-n", "2"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""}, **pipes)
    process.stdin.write("Who art thou?\n")
    process.stdin.flush()
    assert process.stdout.readline()
    [worker] = workers_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    try:
        assert process.wait(WITHIN) == 2  # its input is still open
    finally:
        process.kill()
        _, error = process.communicate()
    assert error.splitlines()[-1] == f"npllama chat: rank 1 of 2 (process {worker}) was ended by SIGKILL"


@needs_proc
def test_ctrl_c_ends_the_command_with_130():
    """Interrupt the process group, as a terminal does; the other ranks are in a session of their own."""
    command = [*COMMAND, "generate", "Once", "--processes", "2", "-n", "400", "--temperature", "1", "--no-echo"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_signals
    )
    process.stdout.read(4)
    workers = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=WITHIN)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert gone(workers)


def test_the_command_gives_the_text_of_one_process():
    texts = []
    for n in ("1", "2"):
        command = [*COMMAND, "generate", "Once", "-n", "40", "--processes", n, "-m", str(demo_path())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        texts.append(done.stdout)
        assert done.stderr.rstrip().endswith("2 processes") == (n == "2")
    assert texts[0] == texts[1]


def test_bundles_and_comparisons_of_several_processes(tmp_path, capsys):
    """Write a bundle, and measure the noise of a comparison, over two processes: a trace of one process is within it."""
    assert main(["golden", "--tokens", "5,6", "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    assert main(["trace", "--tokens", "5,6", "--out", str(tmp_path / "one")]) == 0
    command = ["compare", str(tmp_path / "two"), str(tmp_path / "one"), "-m", str(demo_path()), "--processes", "2"]
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("equal within rounding: ")


def test_a_waiting_rank_blocks_and_is_woken(monkeypatch):
    """Let rank 0 be late until rank 1 is asleep: only its bell wakes it, as it would otherwise sleep too long."""
    monkeypatch.setattr(local, "CHECKED", 2000 * WITHIN)
    monkeypatch.setattr(local, "WORKER", f"import {local.__name__} as local; local.CHECKED = {2000 * WITHIN}; {local.WORKER}")
    model = npllama.load(processes=2)
    group, started, late = group_of(model), time.monotonic(), []
    watchdog = threading.Timer(WITHIN, group.close)  # which ends a wait without a bell
    watchdog.start()

    def tap(name, x):
        if name in ("tok_embeddings", "layers.1.out", "logits"):
            while not group._flags[local.FLAG // 8 + local.ASLEEP]:
                time.sleep(1e-3)
                assert time.monotonic() - started < WITHIN, "rank 1 doesn't block"
            late.append(name)
        return x

    try:
        found = forward(model.params, model.config, [1, 2, 3], tap=tap)
        assert len(late) == 3
        np.testing.assert_allclose(found, forward(model.params, model.config, [1, 2, 3]), rtol=0, atol=1e-4)
    finally:
        watchdog.cancel()
        group.close()
