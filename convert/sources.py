"""Detect a checkpoint's kind from its content, and call that kind's reader: `npllama convert SRC DST`."""

from __future__ import annotations

from pathlib import Path

from npllama import checkpoint
from npllama.checkpoint import CheckpointError, read_json
from npllama.checkpoint.foreign import file_size
from npllama.engine.ranks.shares import shares

from . import gguf, hub, huggingface, llama2c, meta
from . import lora as adapters
from .conversion import OWN, Report, Source, TokenizerChoice, check_dtype, write

EXPECTED = "a folder of Meta's or Hugging Face's, a GGUF file, a .bin or .pt of llama2.c, or hf:owner/name"


def convert(
    src: str | Path,
    dst: str | Path,
    dtype: str = "auto",
    rope_factor: float | None = None,
    force: bool = False,
    report: Report = print,
    tokenizer: str | Path | None = None,
    no_tokenizer: bool = False,
    lora: str | Path | None = None,
    ranks: int = 1,
) -> None:
    """Write the model directory `dst` from a checkpoint of any kind.

    src          a folder, a file, or hf:owner/name[@revision][/original], which is downloaded
    dtype        float32, float16, bfloat16, int8, int4, or auto for each tensor's own type, including its quantisation
    rope_factor  replaces the inferred scaling factor, if Meta's params.json has use_scaled_rope
    force        replace `dst` if it is a model directory
    report       gets a line for everything inferred, left out or chosen
    tokenizer    a tokenizer.model or tokenizer.json, with the files next to it that belong to it, in place of the source's
    no_tokenizer leave it out: the model takes and gives ids
    lora         the folder of a PEFT adapter, which is merged in
    ranks        more than one: `dst` gets a model directory for each rank's share, rank-0-of-4 and so on

    Raises ValueError (CheckpointError, ConfigError, TokenizerError) with one line; nothing is left behind.
    """
    check_dtype(dtype)
    if ranks < 1:
        raise CheckpointError(f"the number of ranks is {ranks}, expected 1 or more")
    folders = [Path(dst) / f"rank-{rank}-of-{ranks}" for rank in range(ranks)] if ranks > 1 else [Path(dst)]
    if ranks > 1 and (Path(dst) / "manifest.json").exists():
        raise CheckpointError(f"{dst} is a model directory, expected a folder for those of {ranks} ranks")
    for folder in folders:
        checkpoint.check_free(folder, force)
    choice = TokenizerChoice(None if tokenizer is None else Path(tokenizer), no_tokenizer)
    if choice.file:
        file_size(choice.file, CheckpointError)  # raises unless it is a file
    source = read(src, rope_factor, report, choice)
    if lora is not None:
        source = adapters.merge(source, Path(lora), report)
    if ranks == 1:
        write(source, dst, dtype, force, report)
        return
    parts = shares(source.config, ranks)
    Path(dst).mkdir(exist_ok=True)
    for folder, share in zip(folders, parts, strict=True):
        write(source, folder, dtype, force, report, share)


def read(src: str | Path, rope_factor: float | None = None, report: Report = print, choice: TokenizerChoice = OWN) -> Source:
    """Open a checkpoint of any kind, with no weight read yet."""
    if str(src).startswith(hub.PREFIX):
        folder, about = hub.download(str(src), report)
        source = read(folder, rope_factor, report, choice)
        source.about |= about
        return source
    src = Path(src)
    if not src.exists():
        raise CheckpointError(f"{src}: not found, expected {EXPECTED}")
    kind = _kind_of_folder(src) if src.is_dir() else _kind_of_file(src)
    if kind == "meta":
        return meta.read(src, rope_factor, report, choice)
    if rope_factor is not None:
        raise CheckpointError(f"{src}: a rope factor is given, but only Meta's params.json leaves it out")
    return {"huggingface": huggingface.read, "gguf": gguf.read, "llama2.c": llama2c.read}[kind](src, report, choice)


def _kind_of_folder(src: Path) -> str:
    names = {path.name for path in src.iterdir()}
    if "manifest.json" in names and "npllama_format" in read_json(src / "manifest.json"):
        raise CheckpointError(f"{src} is a model directory already")
    if "adapter_config.json" in names and not _has_whole_weights(src, names):
        raise CheckpointError(f"{src} holds an adapter (LoRA), expected whole weights: convert its base with --lora {src}")
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return "meta"
    if "params.json" in names and any(meta.WEIGHTS.fullmatch(name) for name in names) and names.isdisjoint(huggingface.WEIGHTS):
        return "meta"
    if "config.json" in names and not names.isdisjoint(huggingface.WEIGHTS):
        return "huggingface"
    if any(name.endswith(".gguf") for name in names):
        return "gguf"
    if "config.json" in names:  # the reader reports what is missing
        return "huggingface"
    if "params.json" in names:
        return "meta"
    raise CheckpointError(f"{src} holds no checkpoint: expected {EXPECTED}")


def _has_whole_weights(src: Path, names: set[str]) -> bool:
    meta_or_gguf = any(name.startswith("consolidated.") or name.endswith(".gguf") for name in names)
    return meta_or_gguf or not names.isdisjoint(huggingface.WEIGHTS) or bool(huggingface.find_shards(src))


def _kind_of_file(src: Path) -> str:
    file_size(src, CheckpointError)
    with open(src, "rb") as file:
        start = file.read(8)
    if not start:
        raise CheckpointError(f"{src} is empty")
    if start[:4] == gguf.MAGIC:
        return "gguf"
    if meta.WHOLE.fullmatch(src.name) and src.with_name("params.json").is_file():
        return "meta"
    if (
        src.name.startswith("consolidated.")
        or src.name.endswith((".safetensors", ".json"))
        or src.name.startswith("pytorch_model")
    ):
        raise CheckpointError(f"{src} is one of a folder's files: expected the folder")
    return "llama2.c"
