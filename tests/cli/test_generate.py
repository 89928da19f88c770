"""Test npllama generate: streaming, and the ends of texts."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import npllama
from npllama.cli import main
from npllama.cli import options as shared

from commands import COMMAND, run
from system import hear_signals


def test_generate_prints_the_prompt_and_its_continuation():
    done = run("generate", "ROMEO:", "-n", "12")
    assert done.returncode == 0
    assert done.stdout.startswith("ROMEO:")
    assert len(done.stdout) > len("ROMEO:\n")
    assert "prefill" in done.stderr
    assert "decode 11 tokens at" in done.stderr
    assert "peak memory" in done.stderr
    bare = run("generate", "ROMEO:", "-n", "12", "--no-echo")
    assert "ROMEO:" + bare.stdout == done.stdout
    assert run("generate", "ROMEO:", "-n", "12").stdout == done.stdout
    assert run("generate", "ROMEO:", "-n", "12", "--seed", "5").stdout != done.stdout


def test_generate_from_nothing_starts_from_bos(capsys):
    model = npllama.load()
    assert main(["generate", "", "-n", "10", "--temperature", "0", "--top-p", "1"]) == 0
    ids = list(npllama.generate(model, [model.tokenizer.bos_id], max_tokens=10))
    assert capsys.readouterr().out == model.tokenizer.decode(ids) + "\n"


def test_recommended_settings_are_used_unless_overridden(capsys):
    model = npllama.load()
    recommended = model.generation
    assert recommended["temperature"] > 0
    ids = model.tokenizer.encode("KING", bos=True)
    for options, settings in (
        ([], {"temperature": recommended["temperature"], "top_p": recommended["top_p"]}),
        (["--temperature", "0"], {"temperature": 0.0, "top_p": recommended["top_p"]}),
        (["--temperature", "1.5", "--top-p", "0.5", "--top-k", "7", "--min-p", "0.01"],
         {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.01}),
    ):  # fmt: skip
        assert main(["generate", "KING", "-n", "20", "--no-echo", *options]) == 0
        expected = model.tokenizer.decode(list(npllama.generate(model, ids, 20, **settings)))
        assert capsys.readouterr().out == expected + "\n"


def test_stop_ends_before_the_text(capsys):
    assert main(["generate", "ROMEO:", "-n", "60", "--temperature", "0", "--no-echo"]) == 0
    text = capsys.readouterr().out
    stop = text[10:13]
    assert main(["generate", "ROMEO:", "-n", "60", "--temperature", "0", "--no-echo", "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_logprobs_print_a_line_per_token(capsys):
    assert main(["generate", "ROMEO:", "-n", "5", "--temperature", "0", "--logprobs", "3"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert len(row) == 3 + 3 * 3
        assert row[:3] == row[3:6]  # greedy takes the likeliest
        assert float(row[2]) >= float(row[8]) >= float(row[11])


def test_ids_work_without_a_tokenizer(bare, capsys):
    assert main(["generate", "--tokens", "1,2,3", "-m", str(bare), "-n", "4"]) == 0
    ids = [int(id) for id in capsys.readouterr().out.split(",")]
    model = npllama.load(bare)
    assert ids == [1, 2, 3, *npllama.generate(model, [1, 2, 3], max_tokens=4)]


@pytest.fixture
def endless(copy_of_demo):
    """Start a command whose model generates id 0 without end; it blocks while nobody reads its output."""
    config = json.loads((copy_of_demo / "config.json").read_text())
    (copy_of_demo / "config.json").write_text(json.dumps(config | {"max_seq_len": 1 << 20}))
    norm = copy_of_demo / "norm.weight.npy"
    np.save(norm, np.zeros_like(np.load(norm)))
    return [*COMMAND, "generate", "ROMEO:", "-m", str(copy_of_demo), "-n", "1000000", "--temperature", "0"]


def test_tokens_stream_as_they_are_made(endless):
    """Read the first characters while the process is still generating."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdout.read(20).startswith(b"ROMEO:")
    assert process.poll() is None
    process.kill()
    process.wait()
    assert len(process.stdout.read()) < 8000  # a buffer would have held back more
    process.stdout.close()


def test_ctrl_c_ends_cleanly(endless):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(endless, text=True, preexec_fn=hear_signals, **pipes)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert "Traceback" not in err
    assert "tokens/s" in err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m npllama generate ROMEO: -n 300 | head -c 5", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "ROMEO"
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_logits_that_are_nan_end_with_2_after_the_text(capsys, monkeypatch):
    model = npllama.load()
    model.params["norm.weight"] = np.full_like(model.params["norm.weight"], np.nan)
    monkeypatch.setattr(shared, "load", lambda *args: model)
    assert main(["generate", "ROMEO:"]) == 2
    out, err = capsys.readouterr()
    assert out == "ROMEO:\n"
    assert err.startswith("npllama generate: new token 1: of 2,256 logits 2,256 are NaN")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who art thou?\n"))
    assert main(["chat"]) == 2
    assert "npllama chat: new token 1: of 2,256 logits" in capsys.readouterr().err


def test_json_is_one_object(capsys):
    assert main(["generate", "ROMEO:", "-n", "5", "--temperature", "0", "--top-p", "1", "--json", "--logprobs", "2"]) == 0
    out, err = capsys.readouterr()
    expected = npllama.complete(npllama.load(), "ROMEO:", max_tokens=5, logprobs=2)
    found = json.loads(out)
    timings = found.pop("timings")
    assert (timings["prefill_tokens"], timings["decode_tokens"]) == (len(expected.prompt_tokens), 4)
    assert min(timings.values()) > 0
    logprobs = [(x["token"], x["piece"], x["logprob"], [tuple(y.values()) for y in x["top"]]) for x in found.pop("logprobs")]
    assert logprobs == [(x.token, x.piece, x.logprob, x.top) for x in expected.logprobs]
    assert found == {
        "text": expected.text,
        "tokens": expected.tokens,
        "finish_reason": "length",
        "prompt_tokens": expected.prompt_tokens,
    }
    assert "[cut at 5 tokens: -n]" in err.splitlines()


def test_json_of_ids_needs_no_tokenizer(bare, capsys):
    assert main(["generate", "--tokens", "1,2,3", "-m", str(bare), "-n", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], len(found["tokens"]), found["prompt_tokens"]) == ("", 4, [1, 2, 3])


def test_a_prompt_on_each_line_of_a_file(tmp_path, capsys):
    prompts = ["ROMEO:", "  Once more", "KING"] * 4
    (tmp_path / "prompts").write_text("\n\n".join(prompts) + "\n")
    options = ["--prompts", str(tmp_path / "prompts"), "-n", "2", "--temperature", "0.9", "--top-p", "1", "--seed", "3"]
    expected = npllama.complete(npllama.load(), prompts, max_tokens=2, temperature=0.9, seed=3, stop="\n")
    assert main(["generate", *options, "--stop", "\n"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [prompt + done.text for prompt, done in zip(prompts, expected, strict=True)]
    cut = sum(done.finish_reason == "length" for done in expected)
    assert 0 < cut < 12
    assert f"[{cut} of 12 cut at 2 tokens: -n]" in err
    assert main(["generate", *options, "--stop", "\n", "--json"]) == 0
    assert [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()] == [done.tokens for done in expected]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["x", "--prompts", "f"], "expected a prompt, or --tokens or --prompts instead of it"),
        (["--prompts", "empty", "--lookup", "3"], "--lookup takes one prompt, but --prompts gives several"),
        (["--prompts", "empty", "--logprobs", "3"], "--logprobs with --prompts needs --json"),
        (["--prompts", "empty"], "empty holds no text, expected a prompt on each line"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty is 0.0, expected more than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(options, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n \n")
    assert main(["generate", *options]) == 2
    assert line in capsys.readouterr().err


def test_where_a_text_was_cut_is_said(copy_of_demo, capsys):
    values = json.loads((copy_of_demo / "config.json").read_text())
    (copy_of_demo / "config.json").write_text(json.dumps(values | {"max_seq_len": 6}))
    for form in ([], ["--logprobs", "1"], ["--json"]):
        for n, expected in (("3", "[cut at 3 tokens: -n]"), ("64", "[context full]")):
            assert main(["generate", "ROMEO:", "-m", str(copy_of_demo), "--temperature", "0", "-n", n, *form]) == 0
            assert expected in capsys.readouterr().err.splitlines()
    assert main(["generate", "--tokens", "1,2", "-m", str(copy_of_demo), "--temperature", "0", "-n", "3"]) == 0
    assert "[cut at 3 tokens: -n]" in capsys.readouterr().err.splitlines()
    assert main(["generate", "ROMEO:", "-m", str(copy_of_demo), "--temperature", "0", "--stop", "\n"]) == 0
    assert "[" not in capsys.readouterr().err


def test_the_repetition_penalty_reaches_the_tokens(capsys):
    assert main(["generate", "ROMEO:", "-n", "20", "--temperature", "0", "--repetition-penalty", "1.4", "--no-echo"]) == 0
    expected = npllama.complete(npllama.load(), "ROMEO:", max_tokens=20, repetition_penalty=1.4)
    assert capsys.readouterr().out == expected.text + "\n"


def test_help_says_that_grammars_are_not_offered(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "constrained by a grammar or a JSON schema is not supported" in capsys.readouterr().out
