"""npllama golden: the model by -m, as everywhere, and by the old spelling."""

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


def test_two_models_are_refused(bare, tmp_path, capsys):
    line = fails(capsys, "golden", "first", "-m", "second", "--out", tmp_path / "x")
    assert line == "npllama golden: found two models, second and first: expected -m MODEL alone"
