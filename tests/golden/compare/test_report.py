"""Test what compare shows: the terminal's table, the page, the report for machines."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from npllama.golden.compare import compare, html
from npllama.golden.compare.report import as_dict
from npllama.golden.compare.text import in_layers, ranges

from candidates import run, save_npz
from system import full_disk


def test_the_table_shows_the_first_failure_and_its_neighbours(traces, arrays, tmp_path, capsys):
    arrays["layers.1.attention.v"][0] = 0
    path = save_npz(tmp_path, arrays)
    _, out, _ = run(capsys, traces / "reference", path)
    assert sum(line.startswith(("layers.", "tok_", "norm", "logits ")) for line in out.splitlines()) == 7
    _, out, _ = run(capsys, traces / "reference", path, "--all")
    assert sum(line.split(" ")[0] in arrays for line in out.splitlines()) == len(arrays)
    assert "\033" not in out


def test_colour_only_where_it_is_wanted(traces, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32m" in run(capsys, traces / "reference", traces / "mine")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run(capsys, traces / "reference", traces / "mine")[1]


def test_the_report_for_machines(traces, arrays, tmp_path, capsys):
    arrays["layers.1.attention.v"][0, 0, 0] = np.nan
    arrays["layers.1.attention.weights"][0, 0, 5] = 0.1  # where the reference has an exact zero
    mine = save_npz(tmp_path, arrays)
    run(capsys, traces / "reference", mine, "--report", tmp_path / "x.json")
    report = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (report["equal"], report["first"]) == (False, "layers.1.attention.v")
    assert report["verdict"].startswith("first divergence: layers.1.attention.v")
    rows = {row["name"]: row for row in report["activations"]}
    assert set(rows) == set(arrays)
    assert rows["logits"]["metrics"].keys() >= {"max_abs", "max_rel", "rms", "nmse", "cosine", "max_ulp", "kl", "top1", "top5"}
    assert rows["norm"]["metrics"]["kl"] is None
    assert rows["layers.1.attention.weights"]["metrics"]["max_rel"] == "inf"
    assert rows["layers.1.attention.v"]["problem"].startswith("1 NaN")
    assert json.loads(json.dumps(as_dict(compare(traces / "reference", mine)), allow_nan=False)) == report


def test_the_page_is_one_file_without_requests(traces, arrays, tmp_path, capsys):
    arrays["<script>"] = np.ones(3, np.float32)
    mine = save_npz(tmp_path, arrays)
    run(capsys, traces / "reference", mine, "--report", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert page == html.page(compare(traces / "reference", mine))
    assert not any(word in page for word in ("http", "src=", "href", "url(", "@import", "<script"))
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 4, "a picture for each layer of the prompt and of the step"
    assert page.count('role="img" aria-label="') == 4
    assert "prefers-color-scheme: dark" in page
    from xml.etree import ElementTree

    ElementTree.fromstring(
        page.partition("<!doctype html>")[2]
        .replace('<meta charset="utf-8">', "")
        .replace('<meta name="viewport" content="width=device-width">', "")
        .replace("<br>", "<br/>")
    )


def test_the_page_shows_three_warnings_and_folds_the_others(traces):
    found = compare(traces / "reference", traces / "mine")
    found.warnings[:] = [f"warning {i}" for i in range(5)]
    shown, _, folded = html.page(found).partition("<details>")
    assert re.findall(r"Warning: warning (\d)", shown) == ["0", "1", "2"]
    assert re.findall(r"Warning: warning (\d)", folded.partition("</details>")[0]) == ["3", "4"]
    assert "<summary>2 more warnings</summary>" in folded


def test_a_report_that_can_not_be_written_is_bad_usage(traces, tmp_path, capsys):
    for path, message in [(tmp_path / "x.txt", ".json or .html"), (tmp_path / "no" / "x.json", "No such file")]:
        status, _, err = run(capsys, traces / "reference", traces / "mine", "--report", path)
        assert (status, message in err) == (2, True)


def test_layers_are_drawn_together():
    assert ranges([0, 1, 2, 5]) == "0-2, 5"
    names = ["layers.0.attention.q", "layers.0.attention.k", "layers.1.attention.q", "layers.1.attention.k", "logits"]
    assert in_layers(names) == "attention.q, attention.k in layers 0-1; logits"


@pytest.mark.parametrize("name", ["x.json", "x.html"])
def test_a_report_that_is_not_whole_does_not_replace_the_last(traces, tmp_path, capsys, name):
    (tmp_path / name).write_text("the last")
    with full_disk(1000):
        status, _, err = run(capsys, traces / "reference", traces / "mine", "--report", tmp_path / name)
    assert (status, err) == (2, f"npllama compare: {tmp_path / name}: File too large\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "the last")]
