"""Test the audit's own code on fake implementations: a right one passes, a broken one is named, a crash stops no other."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from npllama.golden.conformance import config_files, model_files
from npllama.golden.conformance.cases import cases

from system import ROOT, script

sys.path.append(str(ROOT))
from benchmarks.audit import __main__ as main
from benchmarks.audit import published, report
from benchmarks.audit.environments import NotInstalled, environment
from benchmarks.audit.implementations import IMPLEMENTATIONS, Implementation, Variant

pytestmark = pytest.mark.once
MODEL = "llama-3.2-1b-new"
NPLLAMA = f"""
import sys

sys.path[:0] = [{str(main.ADAPTERS)!r}, {str(ROOT)!r}]
import dataclasses, os
import adapting, npllama
from npllama import Config
from npllama.golden.trace import record
from npllama_convert import sources

VARIANT = adapting.job()["variant"]

def load(path):
    source = sources.read(path, report=lambda line: None)
    out = os.path.join(sys.argv[1], "model")
    sources.convert(path, out, force=True, report=lambda line: None)
    model = npllama.load(out)
    if VARIANT == "broken":
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=None))
    return model

def resolve_config(path):
    if VARIANT == "crash":
        os._exit(3)
    if path.endswith("hf_null/config.json"):
        raise ValueError("null is\\nnot understood")
    if path.endswith("hf_wide/config.json"):
        raise adapting.NotOffered("its heads are as wide as dim / n_heads")
    return {{"norm_eps": 1e-5}}

def forward_file(path, tokens):
    model = load(path)
    return npllama.forward(model.params, model.config, tokens)

def trace(path, tokens):
    return record(load(path), tokens)

adapting.run(globals(), "safetensors", ("numpy",))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "fake.py").write_text(NPLLAMA)
    return folder


def audit(work: Path, monkeypatch, variant: str, python=lambda: Path(sys.executable), **options):
    monkeypatch.setattr(published, "MODELS", {MODEL: published.MODELS[MODEL]})
    monkeypatch.setattr(published, "mistakes", lambda config: {"no scaling": {"rope_scaling": None}, "θ": {"rope_theta": 1e4}})
    monkeypatch.setattr(main, "LEVELS", ("L0", "L3", "L4"))
    fake = Implementation("fake", "A fake", "fake.py", ())
    return main.audit(fake, Variant(variant), work, python, adapters=work, **options)


def test_a_right_implementation_passes(work, monkeypatch):
    earlier = work / "results" / "fake-right" / "results" / "L0/resolve_config/hf_wide"
    earlier.mkdir(parents=True)
    np.save(earlier / "constants.npy", np.zeros(len(config_files.CONSTANTS)))  # of a run in which it was offered
    found = audit(work, monkeypatch, "right")
    assert found.stopped == ""
    assert found.levels["L3"].text == "5/5"
    assert found.levels["L4"].text == ""
    assert found.levels["L4"].not_offered == sum(path.startswith("L4/forward_passes/") for path in cases())
    assert found.traces[MODEL].state == "equal"
    assert 0 < found.traces[MODEL].ratio < 8
    assert {finding.where.split("/")[0] for finding in found.findings} == {"L0"}  # whose constants are made up here
    raised = next(finding for finding in found.findings if finding.where.endswith("hf_null"))
    assert raised.found == "ValueError: null is not understood"
    assert "L0/resolve_config/hf_wide" not in {finding.where for finding in found.findings}
    assert "its heads are as wide as dim / n_heads" in found.not_offered


def test_a_broken_one_is_named_and_its_cause_confirmed(work, monkeypatch):
    found = audit(work, monkeypatch, "broken")
    wrong = {finding.where: finding for finding in found.findings if not finding.where.startswith("L0")}
    assert set(wrong) == {"L3/forward_file/scaled_8_safetensors", "L3/forward_file/scaled_32_safetensors", MODEL}
    assert found.levels["L3"].text == "3/5"
    assert found.traces[MODEL].state == "different"
    assert wrong[MODEL].found.startswith("first divergence: layers.0.attention.q_rope")
    assert wrong[MODEL].confirmed == ["no scaling"]
    assert wrong[MODEL].command.startswith("npllama compare ")
    page = report.page(main.content_of([found.as_dict()]))
    assert f"| A fake, broken | {found.versions['numpy']} |" in page
    assert "**no scaling**" in page


def test_a_crash_and_a_long_run_are_said_and_nothing_is_raised(work, monkeypatch):
    found = audit(work, monkeypatch, "crash")
    assert found.stopped.startswith("it ended with status 3")
    assert found.levels == found.traces == {}
    assert audit(work, monkeypatch, "right", seconds=0.01).stopped == "it took more than 0.01 s"

    def python():
        raise NotInstalled("no such package")

    found = audit(work, monkeypatch, "right", python)
    assert found.stopped == "not installed: no such package"
    assert "- A fake: not installed: no such package." in report.page(main.content_of([found.as_dict()]))


def test_what_pip_cant_install_is_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotInstalled, match="no-such-package"):
        environment(Implementation("none", "None", "", ("no-such-package==1",)), tmp_path)
    with pytest.raises(NotInstalled, match="it is a repository of C files"):
        environment(IMPLEMENTATIONS["llama2.c"], tmp_path)


def test_adapters_and_the_suite_mean_the_same_constants():
    adapting = script("benchmarks/audit/adapters/adapting.py")
    assert adapting.CONSTANTS == config_files.CONSTANTS
    for one in IMPLEMENTATIONS.values():
        assert one.why_not or (main.ADAPTERS / one.adapter).exists()


@pytest.mark.parametrize("name", published.MODELS)
def test_adapters_read_the_constants_of_a_config_of_hugging_faces(name):
    adapting, model = script("benchmarks/audit/adapters/adapting.py"), published.MODELS[name]
    values = model_files.hf_config(model.config, model.old)
    theta, rope = adapting.rope_of(values)
    found = adapting.constants(SimpleNamespace(**values), theta, rope or {}, values["head_dim"])
    assert [float(found[key] or 0) for key in config_files.CONSTANTS] == config_files.constants_of(model.config).tolist()


def test_published_models_have_published_constants():
    for name, full in (("llama-1-7b", config_files.LLAMA_1_7B), ("llama-3.2-1b-new", config_files.LLAMA_3_2_1B)):
        small = published.MODELS[name].config
        kept = ("norm_eps", "rope_theta", "rope_scaling", "head_dim", "tied_embeddings")
        assert [getattr(small, key) for key in kept] == [getattr(full, key) for key in kept]
        assert small.n_heads * full.n_kv_heads == small.n_kv_heads * full.n_heads
        for text, changes in published.mistakes(small).items():
            assert dataclasses.replace(small, **changes) != small, text


def test_the_page_is_made_from_its_json():
    content = json.loads((ROOT / "docs" / "audit.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "audit.md").read_text(encoding="utf-8") == report.page(content)
    assert content["models"] == report.described(published.MODELS)
    assert {outcome["name"] for outcome in content["outcomes"]} <= set(IMPLEMENTATIONS)


def test_what_differs_is_explained_by_lines_of_the_source():
    content = json.loads((ROOT / "docs" / "audit.json").read_text(encoding="utf-8"))
    for outcome in content["outcomes"]:
        assert bool(outcome["findings"]) == bool(IMPLEMENTATIONS[outcome["name"]].source), outcome["title"]


def test_list_says_what_is_large(capsys):
    main.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(IMPLEMENTATIONS)
    assert [line.split(":")[0] for line in lines if "more than 500 MB" in line] == ["keras-hub"]
