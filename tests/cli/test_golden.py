"""Test npllama golden: the model by -m, as everywhere, and by the old positional argument."""

from __future__ import annotations

import filecmp
import json

from npllama.cli import main

from commands import fails
from tiny import CONFIGS


def test_the_model_is_given_with_m_and_the_old_positional_still_works(bare, tmp_path):
    options = ["--tokens", "5,6,7", "--out"]
    assert main(["golden", "-m", str(bare), *options, str(tmp_path / "new")]) == 0
    assert main(["golden", str(bare), *options, str(tmp_path / "old")]) == 0
    meta = json.loads((tmp_path / "new" / "trace.json").read_text())
    assert meta["model"]["config"] == json.loads(json.dumps(CONFIGS["grouped"].to_dict()))  # not the embedded one's
    files = sorted(path.name for path in (tmp_path / "new").glob("*.npy"))
    assert filecmp.cmpfiles(tmp_path / "new", tmp_path / "old", files, shallow=False) == (files, [], [])


def test_weights_are_written_where_they_are_asked_for(bare, tmp_path):
    assert main(["golden", "-m", str(bare), "--weights", "--tokens", "5,6", "--out", str(tmp_path / "g")]) == 0
    assert (tmp_path / "g" / "weights" / "layers.1.attention.wq.weight.npy").is_file()


def test_a_trace_takes_a_batch_whose_shorter_rows_are_padded_on_the_left(bare, tmp_path):
    assert main(["trace", "-m", str(bare), "--tokens", "5,6,7", "8", "--steps", "1", "--out", str(tmp_path / "t")]) == 0
    meta = json.loads((tmp_path / "t" / "trace.json").read_text())
    assert meta["tokens"] == [[5, 6, 7], [-1, -1, 8]]
    assert meta["activations"]["step.0/logits"]["shape"] == [2, 1, CONFIGS["grouped"].vocab_size]
    assert main(["trace", "-m", str(bare), "--tokens", "5,6", "--out", str(tmp_path / "one")]) == 0
    assert json.loads((tmp_path / "one" / "trace.json").read_text())["tokens"] == [5, 6]


def test_two_models_are_refused(bare, tmp_path, capsys):
    line = fails(capsys, "golden", "first", "-m", "second", "--out", tmp_path / "x")
    assert line == "npllama golden: found two models, second and first: expected -m MODEL alone"
