"""Merge PEFT's LoRA adapters into a checkpoint during conversion: W + scale · B A, in float32, rounded once.

Hu et al. 2021, arXiv:2106.09685; the scale is alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732). Modules that were
trained whole (`modules_to_save`) replace the base's. Every other kind of adapter is refused, and named.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npllama.checkpoint import CheckpointError, read_json
from npllama.checkpoint.foreign import read_safetensors
from npllama.config import ConfigError, check_whole
from npllama.engine.weights import native, widen
from npllama.errors import shown

from . import huggingface, torch_file
from .conversion import Report, Source, Tensor, number, tie, whole

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
READ_KEYS = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "bias"}
# Settings without effect on the merged weights: the trained modules and layers are known from the tensors.
HARMLESS_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights too
THEIRS = {theirs.replace("N", "{}"): ours for ours, theirs in huggingface.NAMES.items()}
PARTS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def merge(source: Source, folder: Path, report: Report) -> Source:
    """Return the source with an adapter's folder merged in. Raises CheckpointError with one line."""
    config_file = folder / CONFIG
    values = read_json(config_file)
    try:
        scale, rank = _scale(values)
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {' and no '.join(WEIGHTS)}")
    found = read_safetensors(file, CheckpointError) if file.suffix == ".safetensors" else _torch(file, report)

    tensors, config = dict(source.tensors), source.config
    tied = config.tied_embeddings
    if tied:  # until both are known: a module of its own takes the place of one of them
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
        config = dataclasses.replace(config, tied_embeddings=False)
    whole_modules, pairs = _sort(file, found)
    orders = {
        "wq.weight": huggingface.interleaved_order(config.n_heads, config.head_dim),
        "wk.weight": huggingface.interleaved_order(config.n_kv_heads, config.head_dim),
    }
    for name, array in {**whole_modules, **dict.fromkeys(pairs)}.items():
        if name not in tensors:
            raise CheckpointError(f"{file}: {name} is not a parameter of this model")
        if array is not None and array.shape != tensors[name].shape:
            raise CheckpointError(f"{file}: {name} is {list(array.shape)}, expected {list(tensors[name].shape)}")
        if array is not None:
            tensors[name] = dataclasses.replace(Tensor.of(array, orders.get(name[-9:])), dtype=tensors[name].dtype)
    for name, parts in pairs.items():
        if tied and name in ("tok_embeddings.weight", "output.weight"):
            raise CheckpointError(f"{file}: {name} is adapted, but it is the embedding and the output matrix at once")
        tensors[name] = _merged(f"{file}: {name}", tensors[name], parts, rank, scale, orders.get(name[-9:]))
    names = [*source.tensors, *(["output.weight"] if tied else [])]
    silent: Report = (lambda line: None) if tied else report
    config, tensors = tie(config, {name: tensors[name] for name in names}, silent)
    report(f"{folder}: {len(pairs)} matrices merged, rank {rank}, scale {scale:g}; {len(whole_modules)} replaced")
    return dataclasses.replace(source, config=config, tensors=tensors, files=[*source.files, config_file, file])


def _scale(values: Mapping[str, object]) -> tuple[float, int]:
    """Return the scale and the rank. Raises ConfigError for anything but a plain LoRA."""
    if (kind := values.get("peft_type")) != "LORA":
        raise ConfigError(f"peft_type is {shown(kind)}, expected 'LORA'")
    for key, value in values.items():
        if key not in READ_KEYS | HARMLESS_KEYS and value not in (None, False, "", [], {}):
            raise ConfigError(f"{key} is {shown(value)}, which is not merged: expected a plain LoRA")
    if (bias := values.get("bias", "none")) != "none":
        raise ConfigError(f"bias is {shown(bias)}, expected 'none': Llama has no biases")
    if (start := values.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ConfigError(f"init_lora_weights is {shown(start)}, which changes the base's weights too")
    rank = whole(values, "r")
    root = values.get("use_rslora", False)
    if not isinstance(root, bool):
        raise ConfigError(f"use_rslora is {shown(root)}, expected true or false")
    return number(values, "lora_alpha") / (math.sqrt(rank) if root else rank), check_whole("r", rank)


def _torch(file: Path, report: Report) -> dict[str, np.ndarray]:
    arrays = torch_file.arrays(file, torch_file.load(file, report))
    return {name: array for name, array in arrays.items() if array is not None}


def _sort(file: Path, found: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Return the modules that were trained whole, and A and B of each adapted one, by our names."""
    whole_modules: dict[str, np.ndarray] = {}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in found.items():
        rest = name.removeprefix(PREFIX)
        part = next((part for part in PARTS if rest.endswith("." + part)), None)
        theirs = rest.removesuffix("." + part) + ".weight" if part else rest.replace(".base_layer.weight", ".weight")
        layer = re.search(r"\.layers\.(\d{1,6})\.", theirs)
        key = theirs.replace(f".layers.{layer[1]}.", ".layers.{}.", 1) if layer else theirs
        if rest == name or key not in THEIRS:
            raise CheckpointError(f"{file}: {shown(name)} is unexpected: npllama merges LoRA's matrices and whole modules")
        ours = THEIRS[key].replace("N", layer[1], 1) if layer else THEIRS[key]
        if part:
            pairs.setdefault(ours, {})[part[-8] if part.endswith(".weight") else part[-1]] = array
        else:
            whole_modules[ours] = array
    return whole_modules, pairs


def _merged(
    where: str, base: Tensor, parts: Mapping[str, np.ndarray], rank: int, scale: float, order: np.ndarray | None
) -> Tensor:
    """Return base + scale · B A, in float32. An embedding's are transposed: (scale · B A)ᵀ."""
    if set(parts) != {"A", "B"}:
        raise CheckpointError(f"{where} has {' and '.join(sorted(parts))} alone, expected A and B")
    a, b = (widen(native(parts[key])).astype(np.float32) for key in "AB")
    if a.ndim == b.ndim == 2 and where.endswith("tok_embeddings.weight"):
        a, b = b.T, a.T
    expected = (rank, base.shape[-1]), (base.shape[0], rank)
    if (a.shape, b.shape) != expected or len(base.shape) != 2:
        shapes = " and ".join(str(list(shape)) for shape in expected)
        raise CheckpointError(f"{where}: A is {list(a.shape)} and B {list(b.shape)}, expected {shapes}")
    b = (b if order is None else b[order]) * np.float32(scale)

    def rows(start: int, stop: int) -> np.ndarray:
        return widen(base.rows(start, stop)) + b[start:stop] @ a

    return Tensor(base.shape, base.dtype, rows)
