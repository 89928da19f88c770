"""The installed package: its dependencies, extras and files. Needs npllama installed, as in CI."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest

import npllama
from npllama_convert.fetch import NEEDED

from system import ROOT


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
    """Require tiktoken where it has wheels, else regex, which our own BPE needs."""
    markers = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    requirements = [markers.Requirement(line) for line in distribution.requires if "extra ==" not in line]
    here = {"platform_machine": machine}
    assert {r.name for r in requirements if r.marker is None or r.marker.evaluate(here)} == {"numpy", "threadpoolctl", encoder}


def test_the_command_is_ready_for_ctrl_c_before_it_loads_anything():
    """Keep the entry point out of npllama.cli, whose imports would run before it could handle Ctrl-C."""
    assert setup()["options.entry_points"]["console_scripts"].split() == ["npllama", "=", "npllama.__main__:main"]
    code = "import sys; before = {*sys.modules}; import npllama.__main__; print(*{*sys.modules} - before)"
    brought = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in brought if name.startswith("npllama")} == {"npllama", "npllama.__main__"}
    assert "numpy" not in brought


def test_every_public_name_is_there():
    for name in npllama.__all__:
        assert hasattr(npllama, name)
        assert name in dir(npllama)
    assert npllama.ops.rms_norm  # a module, without an import of its own
    with pytest.raises(AttributeError, match="module 'npllama' has no attribute 'nonsense'"):
        npllama.nonsense  # noqa: B018


# ------------------------------------------------------------------------------------------------------------------ the extras


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


EXTRAS = {name: lines.split("\n") for name, lines in setup()["options.extras_require"].items()}
WHAT_A_PERSON_WANTS = {"convert", "torch", "learn", "mpi", "serve", "test", "dev", "judges", "docs", "all"}
OLD = {"hf", "gguf", "sentencepiece", "safetensors", "fetch", "remote", "fast", "plot", "explain", "notebook", "test-torch"}


def brought_by(extra: str) -> set[str]:
    """Return the packages of an extra and of the extras that it includes."""
    found = set()
    for line in filter(None, EXTRAS[extra]):
        own = re.fullmatch(r"npllama\[(.+)\]", line)
        found |= set().union(*map(brought_by, own[1].split(","))) if own else {re.match(r"[\w-]+", line)[0]}
    return found


def test_the_extras_are_what_a_person_wants_and_the_old_names():
    assert set(EXTRAS) == WHAT_A_PERSON_WANTS | OLD
    assert brought_by("all") == set().union(*map(brought_by, ("convert", "torch", "learn", "serve")))
    for name in OLD - {"fast"}:
        assert brought_by(name) & set().union(*map(brought_by, ("convert", "learn"))), name


@pytest.mark.parametrize("extra", ["convert", "learn", "test", "docs"])
def test_only_what_asks_for_torch_brings_it(extra):
    assert brought_by(extra)
    assert not brought_by(extra) & {"torch", "transformers"}


def messages() -> list[tuple[str, str, str]]:
    """Return (file, message, extra) for each message of the code that names an extra, with {} for inserted values."""
    found = []
    for path in sorted(path for folder in ("npllama", "convert", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in (node for node in nodes if id(node) not in inner):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(part.value if isinstance(getattr(part, "value", None), str) else "{}" for part in parts)
            found += [(path.name, text, extra) for extra in re.findall(r"npllama\[([\w,-]+)\]", text)]
    return sorted({*found})


def test_a_message_names_an_extra_that_brings_the_package():
    """Check that it names the package; that of npllama fetch inserts whichever of its packages is missing."""
    packages, said = set().union(*map(brought_by, EXTRAS)), messages()
    assert len({file for file, _, _ in said}) >= 8
    for file, text, extra in said:
        about = packages & set(re.findall(r"[\w-]+", text.replace(f"npllama[{extra}]", "")))
        if "{}: pip install" in text and not about:
            about = set(NEEDED) if file == "fetch.py" else {"torch", "transformers"}
        assert about, f"{file}: {text}"
        assert extra in WHAT_A_PERSON_WANTS, f"{file}: {text}"
        assert about <= brought_by(extra), f"{file}: {text}"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_extras_that_exist(page):
    named = re.findall(r"""['"](?:\.|npllama)\[([\w,-]+)\]""", page.read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= set(EXTRAS)


def test_every_folder_of_modules_is_installed():
    listed = set(setup()["options"]["packages"].split())
    folders = {path.parent for folder in ("npllama", "convert") for path in (ROOT / folder).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == {re.sub(r"^convert\b", "npllama_convert", name) for name in names}


# ----------------------------------------------------------------------------------------------------------- what is installed


def test_the_version_is_one(distribution):
    assert distribution.version == npllama.__version__


def test_the_demo_model_and_the_type_marker_are_installed(distribution):
    if json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        pytest.skip("npllama is installed as editable: its files are the tree's")
    files = {str(file) for file in distribution.files}
    demo = {f"npllama/demo/{name}" for name in ("config.json", "manifest.json", "tokenizer.model", "MODEL_CARD.md")}
    assert demo | {"npllama/demo/layers.0.attention.wq.weight.npy", "npllama/py.typed", "npllama/learn/explain.html"} <= files
    assert "npllama_convert/meta.py" in files
    assert not any(file.startswith("tests/") for file in files)
