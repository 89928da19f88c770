"""Damaged checkpoints for every reader: each converts to a whole model or is refused in one line, and nothing else happens.

    python tests/fuzz_readers.py --minutes 10
    python tests/fuzz_readers.py --reader gguf --seed 3 --case 17        # one case again

Nothing else: no other exception, no warning, no file left behind, no more than 400 MB, no more than 20 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
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

from npllama import atomic
from npllama.checkpoint import verify
from npllama_convert import sources

import foreign
import tiny

CONFIG = tiny.config(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=300, max_seq_len=8)
PARAMS = tiny.random_params(CONFIG, seed=2)
MEMORY, SECONDS = 400 << 20, 20  # what one case may take
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


# ----------------------------------------------------------------------------------------------------------------- the damage


NUMBERS = [0, 1, 2, 3, 7, 8, 255, *((1 << n) - i for n in (15, 16, 24, 31, 32, 40, 62, 63) for i in (0, 1))]
VALUES = [None, True, False, 0, -1, 1.5, 1e308, 10**300, "", "x", "../x", "/etc/passwd", [], [[]], {}, {"a": {}}, ["a"] * 9]
TEXTS = [b"\0", b"\xff\xfe", b"{" * 5000, b"[" * 5000, b"../../", b"\n", b'"', b"1e999", b"NaN", b"-1", b"PK\x03\x04", b"\x80"]


def place(rng: random.Random, size: int) -> int:
    """Anywhere, but rather near the ends, where headers and directories are."""
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
    """A value somewhere in it replaced, taken out or put under another name."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = value
        while isinstance(at, dict) and at:
            key = rng.choice(sorted(at))
            if isinstance(at[key], dict) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            kind = rng.randrange(4)
            if kind == 0:
                del at[key]
            elif kind == 1:
                at[rng.choice(["x", "rope_scaling", "quantization_config", "head_dim", "../x"])] = at.pop(key)
            else:
                at[key] = rng.choice([*VALUES, *NUMBERS])
            break
    return json.dumps(value).encode()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    n = struct.unpack("<Q", data[:8])[0]
    text = damage_json(rng, data[8 : 8 + n])
    return struct.pack("<Q", len(text)) + text + data[8 + n :]


def damage(rng: random.Random, source: Path) -> None:
    """Spoil one or two of the source's files."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    for _ in range(rng.choice([1, 1, 1, 2])):
        file = rng.choice(files)
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
            with contextlib.suppress(ValueError):
                data = damage_json(rng, data)
            file.write_bytes(data)
        elif file.suffix == ".safetensors" and kind < 0.5:
            with contextlib.suppress(ValueError, struct.error):
                data = damage_safetensors(rng, data)
            file.write_bytes(data)
        else:
            file.write_bytes(damage_bytes(rng, data))


# ------------------------------------------------------------------------------------------------------------------- the cases


class TooSlow(BaseException):
    """A case took longer than any damaged file should."""


def too_slow(number: int, frame: object) -> None:
    raise TooSlow(f"more than {SECONDS} s of processor time")


def run_case(good: Path, work: Path, rng: random.Random) -> str:
    """Damage a copy of the source, convert it, and return what came of it. Raises AssertionError for what must not be."""
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    shutil.copytree(good, source)
    only = [path for path in source.iterdir() if path.suffix in (".gguf", ".bin", ".pt")]
    is_folder = len(only) != 1 or len(list(source.iterdir())) > 1
    damage(rng, source if is_folder else only[0])
    target = work / "model"
    try:
        dtype = rng.choice(["auto", "auto", "float32", "bfloat16"])
        sources.convert(source if is_folder else only[0], target, dtype=dtype, report=str)
    except (ValueError, OSError) as error:
        refusal = str(error).strip()
        outcome = "refused"
    else:
        refusal = "none"
        assert verify(target) == [], "the model is not whole"
        shutil.rmtree(target)
        outcome = "converted"
    assert refusal, "an empty message"
    assert "\n" not in refusal, f"more than a line: {refusal}"
    assert len(refusal) < 1500, f"an endless line: {refusal[:300]}"
    left = [path.name for path in work.iterdir() if path != source]
    assert not left, f"left behind: {left}"
    return outcome


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def limit_memory() -> None:
    """Let an allocation beyond the bound fail, on top of the address space that the libraries took."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 30), resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(reader: str, seed: int, cases: Iterator[int], folder: Path) -> str | None:
    """Run cases until there are no more; the first that fails as text, or None."""
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
    parser.add_argument("--case", type=int, help="this one alone; what it was stays in --keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    args = parser.parse_args()
    readers = args.reader or list(READERS)
    faulthandler.enable()
    signal.signal(signal.SIGPROF, too_slow)
    atomic._sync = lambda path: None  # the disk need not keep any of this
    if set(readers) & set(NEED_TORCH):
        import torch  # noqa: F401  before memory is measured and warnings count
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="npllama-fuzz-")))
        folder.mkdir(exist_ok=True)
        for reader in readers:  # imports what it needs
            sources.convert(READERS[reader](make_folder(folder / f"first-{reader}")), folder / "model", report=str)
            shutil.rmtree(folder / "model")
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
