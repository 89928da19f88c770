"""Fuzz every reader of foreign files with damaged ones: checkpoints for convert; traces, maps and reports for compare.

Each checkpoint converts to a whole model, each trace is compared and each report drawn, or it is refused in one line.

    python tests/helpers/fuzz_readers.py --minutes 10
    python tests/helpers/fuzz_readers.py --reader gguf --seed 3 --case 17        # one case again

Nothing else: no other exception, no warning, no file left behind, no more than 400 MB, no more than 20 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from npllama.checkpoint import Model, atomic, verify
from npllama.golden.bundle import write_golden
from npllama.golden.compare import compare
from npllama.golden.compare.inputs import Activations, read_activations
from npllama.golden.compare.report import write_report
from npllama.golden.compare.text import text
from npllama.golden.precision import Precision
from npllama.golden.trace import Recording, run, write_trace
from npllama.learn import plot
from npllama_convert import sources

import foreign
import tiny

CONFIG = tiny.config(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=300, max_seq_len=8)
PARAMS = tiny.random_params(CONFIG, seed=2)
MEMORY, SECONDS = 400 << 20, 20  # limits of one case
VOCABULARY = {
    "tokenizer_model": "llama",
    "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"],
    "tokenizer__ggml__scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
    "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
    "chat_template": "{{ '<|im_start|>system\nBe kind.<|im_end|>' }}",
}


# --------------------------------------------------------------------------------------------------- a good source of each kind


def save_torch(content: object, path: Path, old: bool = False) -> None:
    import torch

    torch.save(content, path, _use_new_zipfile_serialization=not old)


def tensors(arrays: dict[str, np.ndarray]) -> dict:
    import torch

    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def make_meta(folder: Path, old: bool = False) -> Path:
    params = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24, "vocab_size": -1, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(params | {"max_seq_len": 8, "rope_theta": 10000.0}))
    if old:
        save_torch(tensors(PARAMS), folder / "consolidated.00.pth", old=True)
        return folder
    for i in range(2):
        shard = {}
        for name, array in PARAMS.items():
            axis = int(name.endswith(("wo.weight", "w2.weight")))
            shard[name] = array if array.ndim == 1 else np.split(array, 2, axis)[i]
        save_torch(tensors(shard), folder / f"consolidated.{i:02d}.pth")
    return folder


def make_hugging_face(folder: Path, n_shards: int = 1) -> Path:
    foreign.write_hf(folder, CONFIG, PARAMS, "bfloat16" if n_shards > 1 else "float32", n_shards, old=n_shards > 1)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}')
    names = {"chat_template": VOCABULARY["chat_template"], "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with contextlib.suppress(ImportError):
        import tokenizers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def make_pytorch_bin(folder: Path) -> Path:
    foreign.write_hf(folder, CONFIG, PARAMS)
    (folder / "model.safetensors").unlink()
    save_torch(tensors(foreign.hf_tensors(CONFIG, PARAMS)), folder / "pytorch_model.bin")
    return folder


def make_gguf(folder: Path, kind: str = "Q8_0") -> Path:
    config = tiny.config(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=32, vocab_size=300, max_seq_len=8)
    return foreign.write_gguf(folder / "x.gguf", config, tiny.random_params(config, seed=2), kind, **VOCABULARY)


def make_split_gguf(folder: Path) -> Path:
    foreign.write_gguf(folder / "x.gguf", CONFIG, PARAMS, n_shards=2)
    return folder


def make_pt(folder: Path) -> Path:
    args = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24, "vocab_size": 300, "norm_eps": 1e-5}
    save_torch({"model_args": args | {"max_seq_len": 8}, "model": tensors(PARAMS), "iter_num": 3}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


READERS: dict[str, Callable[[Path], Path]] = {
    "huggingface": make_hugging_face,
    "huggingface-sharded": lambda folder: make_hugging_face(folder, n_shards=2),
    "gguf": make_gguf,
    "gguf-f32": lambda folder: make_gguf(folder, "F32"),
    "gguf-split": make_split_gguf,
    "llama2.c": lambda folder: foreign.write_llama2c(folder / "x.bin", CONFIG, PARAMS),
    "meta": make_meta,
    "meta-old": lambda folder: make_meta(folder, old=True),
    "pytorch-bin": make_pytorch_bin,
    "llama2.c-pt": make_pt,
}
NEED_TORCH = ("meta", "meta-old", "pytorch-bin", "llama2.c-pt")
MODEL = Model(CONFIG, PARAMS)
TOKENS = [1, 290, 17, 4, 299]


def make_trace(folder: Path, storage: str = "npy") -> Path:
    """Write a trace as in a golden bundle, with a decode step, or the same in raw storage."""
    if storage == "npy":
        write_golden(MODEL, TOKENS, folder / "trace", 1)
    else:
        write_trace(MODEL, TOKENS, folder / "trace", 1, storage=storage)
    for path in (folder / "trace").iterdir():
        path.rename(folder / path.name)
    (folder / "trace").rmdir()
    return folder


def activations() -> dict[str, np.ndarray]:
    """Write a few sources of each kind, and return them by name."""
    recorded = Recording()
    run(MODEL, np.array(TOKENS), [], Precision("float32"), recorded)
    return {name: recorded[name] for name in ("tok_embeddings", "layers.0.attention.q", "layers.0.attention.scores", "logits")}


def make_npz(folder: Path, names: Callable[[str], str] = str) -> Path:
    np.savez_compressed(folder / "mine.npz", **{names(name): x for name, x in activations().items()})
    return folder / "mine.npz"


def make_npy(folder: Path) -> Path:
    for name, x in activations().items():
        np.save(folder / f"{name}.npy", x)
    return folder


def make_raw(folder: Path) -> Path:
    for name, x in activations().items():
        x.tofile(folder / f"{name}.f32")
    (folder / "shapes.json").write_text(json.dumps({name: x.shape for name, x in activations().items()}))
    return folder


def make_safetensors(folder: Path) -> Path:
    found, header, data = activations(), {}, b""
    for name, x in found.items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [len(data), len(data) + x.nbytes]}
        data += x.tobytes()
    text = json.dumps(header).encode()
    (folder / "mine.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder / "mine.safetensors"


def make_map(folder: Path) -> Path:
    make_npz(folder, lambda name: f"my_{name}")
    rules: dict[str, object] = {f"my_{name}": name for name in ("tok_embeddings", "logits")}
    rules["my_layers.{i}.attention.q"] = {"name": "layers.{i}.attention.q", "axes": "T H*K | T H K", "pairs": "adjacent"}
    rules["my_layers.{i}.attention.scores"] = {
        "name": "layers.{i}.attention.scores",
        "axes": "H T S+",
        "scale": "",
        "unmasked": False,
        "weight": "",
    }
    (folder / "map.json").write_text(json.dumps(rules))
    return folder


def make_report(folder: Path) -> Path:
    port = {name: x + np.float32(1e-3) * x for name, x in activations().items()}
    np.savez(folder / "port.npz", **port)
    write_report(compare(folder / "port.npz", make_npz(folder)), folder / "report.json")
    (folder / "port.npz").unlink()
    (folder / "mine.npz").unlink()
    return folder / "report.json"


# Inputs of compare and plot, by the kind of the candidate; a trace is the reference in half of the cases.
COMPARED: dict[str, Callable[[Path], Path]] = {
    "trace": make_trace,
    "trace-raw": lambda folder: make_trace(folder, "raw"),
    "npz": make_npz,
    "npy": make_npy,
    "raw": make_raw,
    "safetensors": make_safetensors,
    "map": make_map,
    "report": make_report,
}
READERS |= COMPARED


# ----------------------------------------------------------------------------------------------------------------- the damage


NUMBERS = [0, 1, 2, 3, 7, 8, 255, *((1 << n) - i for n in (15, 16, 24, 31, 32, 40, 62, 63) for i in (0, 1))]
VALUES = [None, True, False, 0, -1, 1.5, 1e308, 10**300, "", "x", "../x", "/etc/passwd", [], [[]], {}, {"a": {}}, ["a"] * 9]
VALUES += [5e-324, float("nan"), float("inf"), 10**400, "a\nb", "\ud800", "\0", "x" * 5000, [1, [2]], [-1], [10**18], "0.7"]
TEXTS = [b"\0", b"\xff\xfe", b"{" * 5000, b"[" * 5000, b"../../", b"\n", b'"', b"1e999", b"NaN", b"-1", b"PK\x03\x04", b"\x80"]


def place(rng: random.Random, size: int) -> int:
    """Choose a place, preferably near the ends, where headers and directories are."""
    near = min(size, rng.choice([16, 64, 512, 4096]))
    choice = rng.random()
    return rng.randrange(near) if choice < 0.5 else size - 1 - rng.randrange(near) if choice < 0.75 else rng.randrange(size)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        if not data:
            break
        at, end = place(rng, len(data)), min(len(data), rng.choice([1, 4, 8, 64, 1000]))
        kind = rng.randrange(8)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif kind == 4:
            del data[at : rng.choice([end, len(data)])]
        elif kind == 5:
            data[at:at] = data[at : at + end]
        elif kind == 6:
            data[at:at] = rng.choice(TEXTS)
        else:
            data[at : at + end] = bytes(rng.randrange(256) for _ in range(end))
    return bytes(data)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Replace, remove or rename a value somewhere in the JSON."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = value
        while isinstance(at, dict | list) and at:
            key = rng.choice(sorted(at)) if isinstance(at, dict) else rng.randrange(len(at))
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            kind = rng.randrange(5)
            if kind == 0:
                del at[key]
            elif kind == 1 and isinstance(at, dict):
                names = ["x", "rope_scaling", "quantization_config", "head_dim", "../x", "a\nb", "", "\ud800", "layers.{i}.{i}"]
                at[rng.choice([*names, "step.99999999/logits", "layers.9999999999.out"])] = at.pop(key)
            elif kind == 2 and isinstance(at[key], str):
                at[key] = rng.choice([at[key] * 2, at[key][:-1], at[key] + rng.choice("-+*| {}"), at[key].replace(" ", "*")])
            else:
                at[key] = rng.choice([*VALUES, *NUMBERS])
            break
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace(rng.choice(["null", "1", "[", '"']), rng.choice(["[" * 3000, "NaN", "-Infinity", "9" * 5000]), 1)
    return text.encode()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    n = struct.unpack("<Q", data[:8])[0]
    text = damage_json(rng, data[8 : 8 + n])
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def damage(rng: random.Random, source: Path) -> None:
    """Damage one or two of the source's files."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    tables = [file for file in files if file.suffix == ".json"]
    for _ in range(rng.choice([1, 1, 1, 2])):
        file = rng.choice(tables if tables and rng.random() < 0.4 else files)
        data = file.read_bytes() if file.is_file() else b""
        kind = rng.random()
        if kind < 0.02:
            file.write_bytes(b"")
        elif kind < 0.04:
            file.unlink(missing_ok=True)
        elif kind < 0.06:
            other = rng.choice(files)  # which may be gone already
            file.write_bytes(other.read_bytes() if other.is_file() else b"x")
        elif file.suffix == ".json" and kind < 0.7:
            with contextlib.suppress(ValueError, RecursionError):  # damaged before
                data = damage_json(rng, data)
            file.write_bytes(data)
        elif file.suffix == ".safetensors" and kind < 0.5:
            with contextlib.suppress(ValueError, RecursionError, struct.error):
                data = damage_safetensors(rng, data)
            file.write_bytes(data)
        else:
            file.write_bytes(damage_bytes(rng, data))


# ------------------------------------------------------------------------------------------------------------------- the cases


class TooSlow(BaseException):
    """A case exceeded the time limit."""


def too_slow(number: int, frame: object) -> None:
    raise TooSlow(f"more than {SECONDS} s of processor time")


def convert_source(source: Path, work: Path, rng: random.Random) -> None:
    """Convert a damaged source. Raises AssertionError for an incomplete model."""
    target = work / "model"
    sources.convert(source, target, dtype=rng.choice(["auto", "auto", "float32", "bfloat16"]), report=str)
    assert verify(target) == [], "the model is not whole"
    shutil.rmtree(target)


@functools.cache
def reference(folder: Path) -> Activations:
    """Return the undamaged side of a comparison, written into the folder once."""
    return read_activations(write_trace(MODEL, TOKENS, folder / "reference", 1).path)


def compare_source(source: Path, work: Path, rng: random.Random) -> None:
    """Compare or plot a damaged source, and print the outcome in every form."""
    folder = source if source.is_dir() else source.parent
    if source.name == "report.json":
        report = plot.read_report(source)
        if rng.random() < 0.3:  # a picture takes a second
            plot.plot_error(report, work / "picture.png")
            (work / "picture.png").unlink()
        return
    names = str(folder / "map.json") if (folder / "mine.npz").exists() and source.is_dir() else None
    damaged: Path = folder / "mine.npz" if names else source
    right = reference(work.parent)
    sides = [right, damaged] if names or rng.random() < 0.5 else [damaged, right]
    found = compare(*sides, names=names, model=rng.choice([None, MODEL]), partial=rng.random() < 0.8)
    assert text(found, everything=True)
    for ending in ("json", "html"):
        write_report(found, work / f"report.{ending}")
        (work / f"report.{ending}").unlink()


def run_case(good: Path, work: Path, rng: random.Random) -> str:
    """Damage a copy of the source, read it, and return the outcome. Raises AssertionError for a forbidden one."""
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    shutil.copytree(good, source)
    only = list(source.iterdir())
    source = only[0] if len(only) == 1 and only[0].is_file() else source
    damage(rng, source)
    read = compare_source if good.name.removeprefix("good-") in COMPARED else convert_source
    try:
        read(source, work, rng)
    except (ValueError, OSError) as error:
        refusal, outcome = str(error).strip(), "refused"
        named = read is convert_source or str(work) in refusal or str(work) in str(getattr(error, "filename", ""))
    else:
        refusal, outcome, named = "none", "read", True
    assert refusal, "an empty message"
    assert named, f"no file is named: {refusal}"
    assert "\n" not in refusal, f"more than a line: {refusal}"
    assert len(refusal) < 1500, f"an endless line: {refusal[:300]}"
    left = [path.name for path in work.iterdir() if path.name != "source"]
    assert not left, f"left behind: {left}"
    return outcome


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def limit_memory() -> None:
    """Limit the address space, so that allocations beyond the bound, in addition to the libraries' own, fail."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(reader: str, seed: int, cases: Iterator[int], folder: Path) -> str | None:
    """Run all cases; return the first failure as text, or None."""
    good, outcomes = folder / f"good-{reader}", Counter()
    good.mkdir()
    READERS[reader](good)
    before, started = peak_memory(), time.monotonic()
    for case in cases:
        (folder / "case.txt").write_text(f"--reader {reader} --seed {seed} --case {case}\n")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time: the machine may be busy
        try:
            outcomes[run_case(good, folder / "work", random.Random(f"{seed} {reader} {case}"))] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"--reader {reader} --seed {seed} --case {case}: {type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if (grown := peak_memory() - before) > MEMORY:
            return f"--reader {reader} --seed {seed} --case {case}: {grown >> 20} MB"
    print(f"{reader}: {sum(outcomes.values())} cases in {time.monotonic() - started:.1f} s: {dict(outcomes)}", flush=True)
    return None


def until(seconds: float) -> Iterator[int]:
    end, case = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield case
        case += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", choices=list(READERS), help="one or more (default: all)")
    parser.add_argument("--minutes", type=float, help="for all readers together")
    parser.add_argument("--cases", type=int, default=200, help="for each reader, where no minutes are given (default 200)")
    parser.add_argument("--case", type=int, help="run only this one; its files stay in --keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    args = parser.parse_args()
    readers = args.reader or list(READERS)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, too_slow)
    atomic.sync = lambda path: None  # the disk need not keep any of this
    if set(readers) & set(NEED_TORCH):
        import torch  # noqa: F401  before memory is measured and warnings count
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="npllama-fuzz-")))
        folder.mkdir(exist_ok=True)
        for reader in readers:  # imports what it needs
            good, work = READERS[reader](make_folder(folder / f"first-{reader}")), make_folder(folder / f"warm-{reader}")
            (compare_source if reader in COMPARED else convert_source)(good, work, random.Random(0))
        warnings.simplefilter("error")
        limit_memory()
        failures = []
        for reader in readers:
            if args.case is not None:
                cases = iter([args.case])
            elif args.minutes is not None:
                cases = until(60 * args.minutes / len(readers))
            else:
                cases = iter(range(args.cases))
            if failure := fuzz(reader, args.seed, cases, folder):
                failures.append(failure)
                print(f"FAILED {failure}", flush=True)
    return 1 if failures else 0


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
