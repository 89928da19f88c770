"""Read files that torch.save wrote: only plain tensors are unpickled, and mapped where the format allows it. Needs torch."""

from __future__ import annotations

import importlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import BinaryIO

import numpy as np

from npllama.checkpoint import CheckpointError
from npllama.checkpoint.foreign import file_size
from npllama.errors import shown

from .conversion import NOT_A_PARAMETER, Report, without_wrappers

LONGEST_GLOBAL = 300  # characters of a module's and a member's names


def import_torch() -> ModuleType:
    """Import torch, or raise a CheckpointError that says how to install it."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise CheckpointError("converting needs torch, once: pip install 'npllama[torch]'") from None


def load(path: Path, report: Report) -> object:
    """Return the file's content, its tensors mapped; CheckpointError for anything but tensors and plain values."""
    torch = import_torch()
    file_size(path, CheckpointError)
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise CheckpointError(f"{path} is empty")
    mapped = magic == b"PK\x03\x04"  # a zip; torch's format before 1.6 was a bare pickle
    if mapped:
        _check_zip(path)
    else:
        with open(path, "rb") as file:
            for _ in range(5):  # the old format's: magic number, version, machine, content, names of the storages
                _check_pickle(path, file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # weights_only: a pickle can run code, and this file is not trusted.
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler and the zip reader raise many types
        raise CheckpointError(f"{path} is not a torch checkpoint of plain tensors: {_reason(error)}") from None
    if not mapped:
        report(f"{path.name} is in torch's old format, which can't be mapped: all of it is in memory")
    return content


def arrays(path: Path, state: object) -> dict[str, np.ndarray | None]:
    """Return the parameters of a state dict by name, bfloat16 as its bits in uint16; None for anything that isn't a parameter.

    The state dict may be an entry of what a training run saved, and its names may have the prefixes of wrappers.
    """
    torch = import_torch()
    for key in ("model", "module", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds {type(state).__name__}, expected tensors by name")
    found: dict[str, np.ndarray | None] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: {shown(name)} is {type(tensor).__name__}, expected tensors by name")
        if NOT_A_PARAMETER.fullmatch(name):
            found[name] = None
        elif tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is {tensor.layout} on {tensor.device}, expected a dense tensor")
        elif tensor.is_neg() or tensor.is_conj():
            raise CheckpointError(f"{path}: {name} is negated or conjugated when it is read, expected its plain numbers")
        elif (needed := tensor.numel() * tensor.element_size()) > (there := tensor.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{path}: {name} is {needed:,} bytes, but its storage has {there:,}: expected every number once"
            )
        elif tensor.dtype == torch.bfloat16:
            found[name] = tensor.detach().view(torch.int16).numpy().view(np.uint16)
        elif tensor.dtype in (torch.float16, torch.float32, torch.float64):
            found[name] = tensor.detach().numpy()
        else:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected bfloat16, float16 or float32")
    return without_wrappers(path, found)


def _check_zip(path: Path) -> None:
    """Refuse anything that torch.save doesn't write: compressed members, which may expand without limit, and paths outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # zipfile raises many types on broken archives
        raise CheckpointError(
            f"{path} is not a torch checkpoint of plain tensors: cut off or damaged, its central directory can't be read"
        ) from None
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
            raise CheckpointError(f"{path} holds {member.filename!r:.80}, a name outside the archive")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > member.compress_size:
            raise CheckpointError(f"{path} holds {member.filename!r:.80} compressed, which torch.save does not do")
        if name.name == "data.pkl":
            try:
                with zipfile.ZipFile(path) as archive:
                    content = archive.read(member)
            except Exception:  # torch says what is wrong
                continue
            _check_pickle(path, io.BytesIO(content))


def _check_pickle(path: Path, file: BinaryIO) -> None:
    """Refuse an overlong name of a class or function: torch takes a minute to read a megabyte of it."""
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL" and len(str(argument)) > LONGEST_GLOBAL:
                raise CheckpointError(f"{path} is not a torch checkpoint of plain tensors: it names {shown(argument)}")
    except CheckpointError:
        raise
    except Exception:  # torch says what is wrong
        return


def _reason(error: Exception) -> str:
    """Return the reason for a failure in one line; torch adds advice, such as to unpickle without its safety."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"loading it would run {found[1]}, which is refused"
    is_spoken = isinstance(error, RuntimeError) and str(error)  # the zip reader's; a KeyError for a stray byte explains nothing
    return re.split(r"(?<=\w)\. |\n", str(error))[0] if is_spoken else "its content can't be read"
