"""Fetch a repository of the Hugging Face hub by its name: hf:owner/name[@revision][/original].

The package huggingface_hub downloads, with its cache (HF_HOME), its token (HF_TOKEN, `hf auth login`), its server
(HF_ENDPOINT) and its progress bars. The files that show whether a model is a plain Llama are fetched before its weights.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from npllama.checkpoint import CheckpointError, read_json
from npllama.config import ConfigError

from . import huggingface
from .conversion import COMPANIONS, Report

PREFIX = "hf:"
NAME = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?(/original)?")
ORIGINAL = ["original/params.json", "original/tokenizer.model", "original/consolidated.*.pth"]  # Meta's own files
DESCRIPTION = [*huggingface.TOKENIZERS, *COMPANIONS, "added_tokens.json", "chat_template.jinja", "config.json"]
DESCRIPTION += [name for name in huggingface.WEIGHTS if name.endswith(".json")]
WEIGHTS = [
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
]  # the first that exists


def download(name: str, report: Report) -> tuple[Path, dict[str, object]]:
    """Fetch a conversion's files into huggingface_hub's cache; return the folder, and its origin for the manifest.

    Raises CheckpointError, with one line, for a name, repository or revision that doesn't exist, and without a connection.
    """
    if not (match := NAME.fullmatch(name)):
        raise CheckpointError(f"{name!r:.80}: expected hf:owner/name, hf:owner/name@revision, or either with /original")
    repository, revision, original = match.groups()
    folder = _snapshot(repository, revision, ORIGINAL if original else DESCRIPTION)
    about = {"repository": repository, "revision": folder.name}
    report(f"{repository}: revision {folder.name}")
    if original:
        if not (folder / "original").is_dir():
            raise CheckpointError(f"{name}: the repository has no folder original/ with Meta's files")
        return folder / "original", about
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: the repository has no config.json, expected a model as transformers saves it")
    try:
        huggingface.refuse(read_json(folder / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{name}: config.json: {error}") from None
    for patterns in WEIGHTS:
        folder = _snapshot(repository, folder.name, patterns)  # of the same revision, in case the branch has moved
        if any(path.match(pattern) for path in folder.iterdir() for pattern in patterns):
            return folder, about
    raise CheckpointError(f"{name}: the repository has no weights, expected model*.safetensors or pytorch_model*.bin")


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        library = importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(
            "fetching from the hub needs the package huggingface_hub: pip install 'npllama[convert]'"
        ) from None
    errors = importlib.import_module("huggingface_hub.errors")
    where = f"hf:{repository}" + (f"@{revision}" if revision else "")
    try:
        return Path(library.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        why = "the repository asks for consent first: give it on its page, then log in (hf auth login, or HF_TOKEN)"
    except errors.RepositoryNotFoundError:
        why = "there is no such repository, or it is private and you are not logged in (hf auth login, or HF_TOKEN)"
    except errors.RevisionNotFoundError:
        why = "there is no such revision"
    except errors.LocalEntryNotFoundError:
        why = "the hub can't be reached, and the cache does not hold it"
    except Exception as error:  # the package, and the one below that talks HTTP, raise many types
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
    raise CheckpointError(f"{where}: {why}")
