"""What `pip install .` brings: needs npllama installed, as CI does it."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest

import npllama

from conftest import ROOT


@pytest.fixture(scope="module")
def distribution():
    # A build leaves an egg-info in the tree, which is found too where the tree is on the path; what was installed has a RECORD.
    for found in importlib.metadata.distributions(name="npllama"):
        if found.read_text("RECORD"):
            return found
    pytest.skip("npllama is not installed")


@pytest.mark.parametrize(
    ("machine", "encoder"),
    [("x86_64", "tiktoken"), ("AMD64", "tiktoken"), ("aarch64", "tiktoken"), ("arm64", "tiktoken")]
    + [(machine, "regex") for machine in ("armv7l", "i686", "s390x", "ppc64le", "riscv64", "ARM64")],
)
def test_the_core_is_numpy_and_what_encodes_text_there(distribution, machine, encoder):
    """tiktoken where it has wheels, else what our own merging needs."""
    markers = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    requirements = [markers.Requirement(line) for line in distribution.requires if "extra ==" not in line]
    here = {"platform_machine": machine}
    assert {r.name for r in requirements if r.marker is None or r.marker.evaluate(here)} == {"numpy", "threadpoolctl", encoder}


def test_the_command_is_ready_for_ctrl_c_before_it_loads_anything():
    """Were the entry point in the command line's own module, its imports would come first."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["options.entry_points"]["console_scripts"].split() == ["npllama", "=", "npllama.__main__:main"]
    code = "import sys; before = {*sys.modules}; import npllama.__main__; print(*{*sys.modules} - before)"
    brought = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in brought if name.startswith("npllama")} == {"npllama", "npllama.__main__"}
    assert "numpy" not in brought


def test_every_public_name_is_there():
    for name in npllama.__all__:
        assert getattr(npllama, name) is not None
        assert name in dir(npllama)
    assert npllama.ops.rms_norm  # a module, without an import of its own
    with pytest.raises(AttributeError, match="module 'npllama' has no attribute 'nonsense'"):
        npllama.nonsense  # noqa: B018


def test_the_test_extra_brings_no_torch(distribution):
    brought = {re.match(r"[\w-]+", line)[0] for line in distribution.requires if re.search(r"""extra == ['"]test['"]""", line)}
    assert "pytest" in brought
    assert not brought & {"torch", "transformers"}


def test_the_version_is_one(distribution):
    assert distribution.version == npllama.__version__


def test_the_demo_model_and_the_type_marker_are_installed(distribution):
    if json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("npllama is installed as editable: its files are the tree's")
    files = {str(file) for file in distribution.files}
    demo = {f"npllama/demo/{name}" for name in ("config.json", "manifest.json", "tokenizer.model", "MODEL_CARD.md")}
    assert demo | {"npllama/demo/layers.0.attention.wq.weight.npy", "npllama/py.typed", "npllama/explain.html"} <= files
    assert "npllama_convert/meta.py" in files
    assert not any(file.startswith("tests/") for file in files)
