"""Test `convert`: the same weights give the same bits from any source, and nothing is imported or fetched unasked."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from npllama import LinearRopeScaling, parameter_shapes
from npllama.checkpoint import open_model, verify, writing
from npllama.cli import main
from npllama_convert import conversion, sources

import tiny
from conversions import assert_same, convert, refused

foreign = pytest.importorskip("foreign", reason="ml_dtypes is not installed", exc_type=ImportError)

CONFIG = tiny.config(n_layers=1)
PARAMS = tiny.random_params(CONFIG, seed=5)


# ------------------------------------------------------------------------------------------------- one model, whatever its form


@pytest.mark.parametrize("order", [None, np.array([2, 0, 1])])
def test_a_mapped_tensor_is_read_in_native_byte_order(order):
    """Test dtypes in a foreign byte order, as a file's `<f4` is on a big-endian machine."""
    x = tiny.uniform(1, (3, 4))
    found = conversion.Tensor.of(tiny.byte_swapped(x), order)
    assert found.dtype == found.rows(0, 2).dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(list(found.blocks())), x if order is None else x[order])
    assert found.same_bits(conversion.Tensor.of(x, order))


@pytest.mark.parametrize(("block_bytes", "rows"), [(1, [1] * 7), (63, [1] * 7), (64, [2, 2, 2, 1]), (1000, [7])])
def test_blocks_are_as_many_rows_as_fit(block_bytes, rows, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_BYTES", block_bytes)
    blocks = conversion.Tensor.of(np.zeros((7, 8), np.float32)).blocks()
    assert [len(block) for block in blocks] == rows


def assert_equal_models(folders: list[Path]) -> None:
    first, *others = folders
    for other in others:
        assert (other / "config.json").read_bytes() == (first / "config.json").read_bytes()
        assert open_model(other).manifest["tensors"] == open_model(first).manifest["tensors"]  # each file's sha256


@pytest.mark.torch
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_meta_hugging_face_and_gguf_give_the_same_bits(tmp_path, name, quick_conversion):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from to_meta import to_meta

    config = tiny.CONFIGS[name]
    params = tiny.random_params(config, seed=8)
    foreign.write_hf(tmp_path / "hf-src", config, params)
    foreign.write_gguf(tmp_path / "x.gguf", config, params)
    factor = config.rope_scaling and config.rope_scaling.factor
    convert(tmp_path / "hf-src", tmp_path / "hf", dtype="float32")
    to_meta(tmp_path / "hf", tmp_path / "meta-src")
    convert(tmp_path / "meta-src", tmp_path / "meta", dtype="float32", rope_factor=factor)
    convert(tmp_path / "x.gguf", tmp_path / "gguf", dtype="float32")
    assert_same(tmp_path / "meta", params)
    assert_equal_models([tmp_path / "meta", tmp_path / "hf", tmp_path / "gguf"])


@pytest.mark.torch
def test_stories260k_is_one_model_in_every_form(tmp_path, shared_data):
    pytest.importorskip("gguf", reason="gguf is not installed")
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    src = shared_data / "stories260K"
    convert(src, tmp_path / "meta", dtype="float32")
    model = open_model(tmp_path / "meta")
    foreign.write_hf(tmp_path / "hf-src", model.config, model.params)
    shutil.copy(src / "tokenizer.model", tmp_path / "hf-src")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(src / "tokenizer.model"))
    ids = range(processor.vocab_size())
    kinds = [2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in ids]
    vocabulary = {
        "tokenizer_model": "llama",
        "tokenizer__ggml__tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer__ggml__scores": [processor.get_score(i) for i in ids],
        "tokenizer__ggml__token_type": kinds,
    }
    foreign.write_gguf(tmp_path / "x.gguf", model.config, model.params, **vocabulary)
    convert(tmp_path / "hf-src", tmp_path / "hf", dtype="float32")
    convert(tmp_path / "x.gguf", tmp_path / "gguf", dtype="float32")
    assert_equal_models([tmp_path / "meta", tmp_path / "hf", tmp_path / "gguf"])
    text = "Once upon a time, there was a little girl named Lily."
    assert open_model(tmp_path / "gguf").tokenizer.encode(text) == model.tokenizer.encode(text)


# ------------------------------------------------------------------------------------------------------------ what SRC is


def test_each_kind_is_told_by_its_content_not_its_name(tmp_path, quick_conversion):
    pytest.importorskip("gguf", reason="gguf is not installed")
    foreign.write_gguf(tmp_path / "x.bin", CONFIG, PARAMS)
    foreign.write_llama2c(tmp_path / "y.gguf", CONFIG, PARAMS)
    for src, kind in (("x.bin", "gguf"), ("y.gguf", "llama2.c")):
        convert(tmp_path / src, tmp_path / f"m-{kind}")
        assert open_model(tmp_path / f"m-{kind}").manifest["source"]["kind"] == kind
        assert_same(tmp_path / f"m-{kind}", PARAMS)


def test_what_is_no_source_is_one_line(tmp_path, quick_conversion):
    dst = tmp_path / "m"
    refused(tmp_path / "nothing", dst, r"nothing: not found, expected a folder of Meta's or Hugging Face's, a GGUF file, ")
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS)
    refused(src / "model.safetensors", dst, r"model\.safetensors is one of a folder's files: expected the folder$")
    refused(src / "config.json", dst, r"config\.json is one of a folder's files: expected the folder$")
    (src / "empty").write_bytes(b"")
    refused(src / "empty", dst, r"empty is empty$")
    convert(src, tmp_path / "model")
    refused(tmp_path / "model", dst, r"model is a model directory already$")
    (src / "adapter_config.json").write_text("{}")
    (src / "model.safetensors").unlink()
    refused(src, dst, r"src holds an adapter \(LoRA\), expected whole weights: convert its base with --lora")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", dst, r"bare holds no checkpoint: expected a folder of Meta's")


def test_a_taken_target_is_reported_before_the_source_is_read(tmp_path, quick_conversion):
    """Check the target first: reading the source may mean a download of gigabytes."""
    (tmp_path / "m").mkdir()
    refused("hf:owner/never-asked", tmp_path / "m", r"m exists: choose another name, or replace it with --force$")
    (tmp_path / "m" / "thesis.txt").write_text("precious")
    refused("hf:owner/never-asked", tmp_path / "m", r"m is not replaced: ", force=True)


def test_a_gguf_in_a_folder_with_a_config_json_is_found(tmp_path, quick_conversion):
    """Read a folder as repositories of GGUF files have it."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS)
    (src / "model.safetensors").unlink()
    foreign.write_gguf(src / "x.gguf", CONFIG, PARAMS)
    convert(src, tmp_path / "m")
    assert_same(tmp_path / "m", PARAMS)


def test_a_rope_factor_is_for_meta_alone(tmp_path, quick_conversion):
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS)
    refused(src, tmp_path / "m", r"a rope factor is given, but only Meta's params\.json leaves it out$", rope_factor=8.0)


def test_the_command_line_says_it_in_one_line_and_ends_with_2(tmp_path, capsys):
    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS, model_type="gemma2")
    assert main(["convert", str(src), str(tmp_path / "m")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"npllama convert: {src}/config.json: model_type is 'gemma2', expected llama or mistral\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.torch
def test_linear_scaling_can_not_be_said_in_meta_s_words(tmp_path, quick_conversion):
    from to_meta import to_meta

    config = tiny.config(n_layers=1, rope_scaling=LinearRopeScaling(2.0))
    convert(foreign.write_hf(tmp_path / "src", config, PARAMS), tmp_path / "m")
    assert open_model(tmp_path / "m").config == config
    with pytest.raises(ValueError, match=r"params\.json can't say LinearRopeScaling\(factor=2\.0\)"):
        to_meta(tmp_path / "m", tmp_path / "meta")


# ------------------------------------------------------------------------------------------------------- torch, memory, code


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise RuntimeError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from npllama.cli import main
for src, dst in zip(sys.argv[1::2], sys.argv[2::2]):
    assert main(["convert", src, dst]) == 0, src
assert "torch" not in sys.modules
"""


def test_safetensors_gguf_and_bin_need_no_torch(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    forms = [
        foreign.write_hf(tmp_path / "hf", CONFIG, PARAMS, "bfloat16", n_shards=2),
        foreign.write_gguf(tmp_path / "x.gguf", CONFIG, PARAMS, "Q8_0"),
        foreign.write_llama2c(tmp_path / "x.bin", CONFIG, PARAMS),
    ]
    pairs = [str(path) for i, src in enumerate(forms) for path in (src, tmp_path / f"m{i}")]
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *pairs], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for i in range(len(forms)):
        assert verify(tmp_path / f"m{i}") == []


@pytest.mark.parametrize("form", ["hf", "gguf", "bin", pytest.param("bin model", marks=pytest.mark.torch)])
def test_memory_is_a_few_blocks_whatever_the_size(tmp_path, form, monkeypatch):
    monkeypatch.setattr("npllama.checkpoint.atomic.sync", lambda path: None)
    config = tiny.config(dim=1024, n_heads=16, n_kv_heads=16, head_dim=64, ffn_dim=2048, vocab_size=2048, n_layers=1)
    params = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    if form == "hf":
        src = foreign.write_hf(tmp_path / "src", config, params)
    elif form == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
        src = foreign.write_gguf(tmp_path / "src.gguf", config, params, "Q8_0")
    elif form == "bin":
        src = foreign.write_llama2c(tmp_path / "src.bin", config, params)
    else:
        import torch

        src = foreign.write_hf(tmp_path / "src", config, params)
        (src / "model.safetensors").unlink()
        tensors = {name: torch.from_numpy(array) for name, array in foreign.hf_tensors(config, params).items()}
        torch.save(tensors, src / "pytorch_model.bin")
    n_bytes = sum(array.nbytes for array in params.values())
    del params
    convert(src, tmp_path / "warm")
    tracemalloc.start()
    try:
        convert(src, tmp_path / "m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_bytes > 50e6
    # The rows of a quantised matrix lie on the last axis of its file: it is collected, as it is stored.
    collected = max(array.nbytes for array in open_model(tmp_path / "m").params.values()) if form == "gguf" else 0
    assert peak < 12 * writing.BLOCK_BYTES + collected


# ----------------------------------------------------------------------------------------------------------------------- hf:


class Hub(http.server.BaseHTTPRequestHandler):
    """Serve the hub's routes for a download: a revision's commit, its list of files, and the files."""

    files: dict[str, dict[str, bytes]]  # by repository
    requests: list[tuple[str, str]]
    tokens: set[str | None]
    COMMIT = "0123456789abcdef0123456789abcdef01234567"
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        type(self).requests.append((self.command, self.path))
        type(self).tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"] and len(path) >= 4:
            self.answer_api("/".join(path[2:4]), path[4:])
        elif len(path) > 4 and path[2] == "resolve":
            self.answer_file("/".join(path[:2]), "/".join(path[4:]))
        else:
            self.send(404, b"{}")

    do_HEAD = do_GET

    def answer_api(self, repository, rest):
        if repository == "owner/gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif repository not in self.files:
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[1:2] not in ([], ["main"], ["v1.0"], [self.COMMIT]):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data) & (1 << 160) - 1:040x}"}
                for name, data in self.files[repository].items()
            ]
            self.send(200, json.dumps(found).encode())
        else:
            siblings = [{"rfilename": name} for name in self.files[repository]]
            self.send(200, json.dumps({"id": repository, "sha": self.COMMIT, "siblings": siblings}).encode())

    def answer_file(self, repository, name):
        if (data := self.files.get(repository, {}).get(name)) is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.send(200, data, {"ETag": f'"{hash(data) & (1 << 64) - 1:x}"', "X-Repo-Commit": self.COMMIT})

    def send(self, status, data, headers=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """Start a local server; return a function that runs `npllama convert` against it with a cache of its own."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    class Server(Hub):
        files, requests, tokens = {}, [], set()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
        }
        environment |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

        def run(src: str, dst: Path, **more: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "npllama", "convert", src, str(dst)]
            return subprocess.run(command, capture_output=True, text=True, env=environment | more)

        Server.run = staticmethod(run)
        yield Server
        server.shutdown()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_repository_by_name(tmp_path, hub):
    files = folder_files(foreign.write_hf(tmp_path / "src", CONFIG, PARAMS, n_shards=2))
    unwanted = {
        "pytorch_model.bin": b"not wanted",
        "README.md": b"# Read me",
        "onnx/model.onnx": b"neither",
        ".gitattributes": b"",
    }
    hub.files["owner/name"] = files | unwanted
    result = hub.run("hf:owner/name", tmp_path / "m", HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "m", PARAMS)
    source = open_model(tmp_path / "m").manifest["source"]
    assert (source["kind"], source["repository"], source["revision"]) == ("huggingface", "owner/name", hub.COMMIT)
    assert "Bearer hf_secret" in hub.tokens
    fetched = {path.partition("?")[0].rsplit("/", 1)[1] for method, path in hub.requests if "/resolve/" in path}
    assert fetched == files.keys()

    hub.requests.clear()
    hub.files.clear()  # offline, from the cache
    result = hub.run("hf:owner/name", tmp_path / "again", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert hub.requests == []
    assert_same(tmp_path / "again", PARAMS)


@pytest.mark.torch
def test_a_revision_and_the_older_weights(tmp_path, hub):
    import torch

    src = foreign.write_hf(tmp_path / "src", CONFIG, PARAMS)
    (src / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(x) for name, x in foreign.hf_tensors(CONFIG, PARAMS).items()}, src / "pytorch_model.bin")
    hub.files["owner/name"] = folder_files(src)
    result = hub.run("hf:owner/name@v1.0", tmp_path / "m")
    assert result.returncode == 0, result.stderr
    assert any("/revision/v1.0" in path for _, path in hub.requests)
    assert_same(tmp_path / "m", PARAMS)


@pytest.mark.torch
def test_the_folder_in_meta_s_form(tmp_path, hub):
    from to_meta import to_meta

    convert(foreign.write_hf(tmp_path / "src", CONFIG, PARAMS), tmp_path / "hf")
    to_meta(tmp_path / "hf", tmp_path / "meta-src")
    hub.files["owner/name"] = {f"original/{name}": data for name, data in folder_files(tmp_path / "meta-src").items()}
    hub.files["owner/name"]["model.safetensors"] = b"not wanted"
    result = hub.run("hf:owner/name/original", tmp_path / "m")
    assert result.returncode == 0, result.stderr
    assert open_model(tmp_path / "m").manifest["source"]["kind"] == "meta"
    assert_same(tmp_path / "m", PARAMS)
    assert not any("model.safetensors" in path for _, path in hub.requests if "resolve" in path)


def test_a_foreign_architecture_is_refused_before_its_weights_are_fetched(tmp_path, hub):
    hub.files["owner/name"] = folder_files(foreign.write_hf(tmp_path / "src", CONFIG, PARAMS, model_type="qwen3"))
    result = hub.run("hf:owner/name", tmp_path / "m")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(
        "hf:owner/name: config.json: model_type is 'qwen3', expected llama or mistral"
    )
    assert not any("safetensors" in path for _, path in hub.requests if "/resolve/" in path)
    assert not (tmp_path / "m").exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:owner/other", "hf:owner/other: there is no such repository, or it is private and you are not logged in"),
        ("hf:owner/gated", "hf:owner/gated: the repository asks for consent first"),
        ("hf:owner/name@nowhere", "hf:owner/name@nowhere: there is no such revision"),
        ("hf:owner/name", "hf:owner/name: the repository has no config.json"),
        ("hf:owner/name/original", "hf:owner/name/original: the repository has no folder original/"),
        ("hf:owner/weightless", "hf:owner/weightless: the repository has no weights"),
        ("hf:name", "'hf:name': expected hf:owner/name"),
        ("hf:../name", "hf:../name: Repo id must use alphanumeric chars"),
        ("hf:owner/name/other", "'hf:owner/name/other': expected hf:owner/name"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(tmp_path, hub, name, expected):
    config = json.dumps(foreign.hf_config(CONFIG)).encode()
    hub.files |= {"owner/name": {"README.md": b"x"}, "owner/weightless": {"config.json": config}}
    result = hub.run(name, tmp_path / "m")
    assert result.returncode == 2
    *_, last = result.stderr.splitlines()
    assert last.startswith("npllama convert: ")
    assert expected in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "m").exists()


def test_no_server_is_one_line(tmp_path, hub):
    result = hub.run("hf:owner/name", tmp_path / "m", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("hf:owner/name: the hub can't be reached, and the cache does not hold it")


def test_without_the_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'npllama\[convert\]'$"):
        sources.read("hf:owner/name")


def test_matrices_of_two_dtypes_are_tied_if_every_block_is_equal(quick_conversion):
    x = np.arange(4000, dtype=np.float32).reshape(100, 40) % 256
    for row in (None, 0, 99):
        other = x.astype(np.float16)
        if row is not None:
            other[row, -1] += 1
        assert conversion.Tensor.of(x).same_values(conversion.Tensor.of(other)) == (row is None)
