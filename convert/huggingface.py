"""Read Hugging Face folders: config.json, model.safetensors or its shards, tokenizer.json. Only pytorch_model.bin needs torch.

safetensors files are mapped with NumPy alone (npllama.checkpoint.foreign), bfloat16 as its raw 16 bits.

Hugging Face's attention rotates x[j] with x[j + K/2], Meta's x[2j] with x[2j+1]: the rows of its wq and wk are permuted
within each head, and restored here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npllama import checkpoint
from npllama.checkpoint import CheckpointError, read_json
from npllama.checkpoint.foreign import SAFETENSORS_DTYPES, read_safetensors
from npllama.config import Config, ConfigError, LinearRopeScaling, RopeScaling

from . import torch_file
from .conversion import (
    OWN,
    Report,
    Source,
    Tensor,
    TokenizerChoice,
    add_tokenizer,
    head_sizes,
    match,
    number,
    read_generation,
    refuse_foreign,
    tie,
    whole,
    within_window,
    without_wrappers,
)
from .quantised_folders import INTEGERS, Quantised, Undone, open_quantised, reader_of
from .templates import add_templates, templates_of_folder

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.N.attention_norm.weight": "model.layers.N.input_layernorm.weight",
    "layers.N.attention.wq.weight": "model.layers.N.self_attn.q_proj.weight",
    "layers.N.attention.wk.weight": "model.layers.N.self_attn.k_proj.weight",
    "layers.N.attention.wv.weight": "model.layers.N.self_attn.v_proj.weight",
    "layers.N.attention.wo.weight": "model.layers.N.self_attn.o_proj.weight",
    "layers.N.ffn_norm.weight": "model.layers.N.post_attention_layernorm.weight",
    "layers.N.feed_forward.w1.weight": "model.layers.N.mlp.gate_proj.weight",
    "layers.N.feed_forward.w2.weight": "model.layers.N.mlp.down_proj.weight",
    "layers.N.feed_forward.w3.weight": "model.layers.N.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MODEL_TYPES = ("llama", "mistral")  # Mistral's models are Llamas, except for a sliding window
FOREIGN_KEY = re.compile(
    r"moe.*|.*experts.*|vision_.*|audio_.*|quantization.*|compression_config|use_qk_norm"
    r"|.*softcapping|no_rope_layer.*|attention_chunk_size|(embedding|residual|attention)_multiplier|logit_scale|logits_scaling"
)
Dtypes = Mapping[str, np.dtype]  # of safetensors
QUANTISED = ("quantization", "quantization_config")  # quantised_folders.py reads them
# A folder's weights: one file, or the index of several; in the order of preference.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD = re.compile(r"(model|pytorch_model|ft-model)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
TORCHTUNE = re.compile(r"hf_model_(\d{4})_(\d+)\.pt")  # its number and its epoch
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first also has the tokens that were added to the second


def read(src: Path, report: Report, choice: TokenizerChoice = OWN) -> Source:
    """Open the folder of a Llama that transformers saved. Raises CheckpointError, a ValueError, with one line."""
    config_file = src / "config.json"
    values = read_json(config_file)
    try:
        refuse(values)
        dtypes = SAFETENSORS_DTYPES | (INTEGERS if reader_of(values)[0] else {})  # integer types are those of quantised weights
        index = next((src / name for name in WEIGHTS if (src / name).is_file()), None)
        if index is None:
            index = src
            weights, found = _open_shards(src, dtypes, report)
        else:
            weights, found = _open_weights(index, dtypes, report)
        arrays = open_quantised(index, values, found)
        tied = "lm_head.weight" not in arrays
        if tied and values.get("tie_word_embeddings") is False:
            raise CheckpointError(f"{index}: lm_head.weight is missing, but config.json says tie_word_embeddings: false")
        config = resolve(values, tied, report)
    except ConfigError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    orders = {
        "q_proj.weight": interleaved_order(config.n_heads, config.head_dim),
        "k_proj.weight": interleaved_order(config.n_kv_heads, config.head_dim),
    }
    wrapped = {name: None if x is None else _tensor(x, orders.get(name[-13:])) for name, x in arrays.items()}
    tensors = match(index, config, NAMES, wrapped, report)
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key) and not any(name.endswith(".bias") for name in found):
            raise CheckpointError(f"{index}: there are no biases, but config.json says {key}: true")
    config, tensors = tie(config, tensors, report)
    if values.get("tie_word_embeddings") is True and not config.tied_embeddings:
        raise CheckpointError(f"{index}: lm_head.weight differs from the embedding, but config.json says they are tied")

    generation, files = read_generation(src, config, report, values)
    source = Source("huggingface", config, tensors, [config_file, *weights], generation=generation)
    tokenizer = choice.of(next((src / name for name in TOKENIZERS if (src / name).is_file()), None))
    if tokenizer:
        own = src / "generation_config.json"
        source.tokenizer = {own.name: own, **files} if choice.file and own.is_file() else {**files}
        loaded = add_tokenizer(source, tokenizer, report)
        for folder in dict.fromkeys((tokenizer.parent, src)):
            named, read_from = templates_of_folder(folder, report)
            source.files += [file for file in read_from if file not in source.files]
            if named or folder == src:
                add_templates(source, named, loaded, folder, report)
                break
    return source


# --------------------------------------------------------------------------------------------------------------- config.json


def refuse(values: Mapping[str, object]) -> None:
    """Raise ConfigError, which names the key, for a config.json of anything but a plain Llama."""
    if (kind := values.get("model_type")) not in MODEL_TYPES:
        raise ConfigError(f"model_type is {kind!r:.80}, expected {' or '.join(MODEL_TYPES)}")
    reader_of(values)
    refuse_foreign({key: value for key, value in values.items() if key not in QUANTISED}, FOREIGN_KEY)
    if (act := values.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act is {act!r:.80}, expected 'silu'")
    layers = values.get("layer_types") or []
    kinds = ("full_attention", "sliding_attention") if values.get("sliding_window") else ("full_attention",)
    if not isinstance(layers, list) or any(layer not in kinds for layer in layers):
        raise ConfigError(f"layer_types has layers other than {' and '.join(kinds)}, which npllama does not compute")
    _rope(values)


def resolve(values: Mapping[str, object], tied: bool, report: Report) -> Config:
    """Return every model constant from config.json; missing ones are inferred as transformers does, and reported."""
    known = {key: value for key, value in values.items() if value is not None}
    n_heads, n_kv_heads, head_dim = head_sizes(
        known, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", report
    )
    rope_theta, rope_scaling = _rope(known, report)
    if rope_theta is None:
        rope_theta = 10000.0
        report("rope_theta: 10000 (inferred: transformers' default)")
    if "max_position_embeddings" not in known:
        known["max_position_embeddings"] = 2048
        report("max_seq_len: 2048 (inferred: transformers' default)")
    return Config(
        dim=whole(known, "hidden_size"),
        n_layers=whole(known, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=whole(known, "intermediate_size"),
        vocab_size=whole(known, "vocab_size"),
        norm_eps=number(known, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_seq_len=within_window(known, "sliding_window", whole(known, "max_position_embeddings"), report),
        tied_embeddings=tied,
    )


def _rope(
    values: Mapping[str, object], report: Report | None = None
) -> tuple[float | None, RopeScaling | LinearRopeScaling | None]:
    """Return rope_theta and the scaling, from rope_parameters (transformers 5), or rope_theta and rope_scaling (before)."""
    rope = {key: values[key] for key in ("rope_theta", "original_max_position_embeddings") if values.get(key) is not None}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(section := values.get(key) or {}, Mapping):
            raise ConfigError(f"{key} is {section!r:.80}, expected an object or null")
        rope |= {name: value for name, value in section.items() if value is not None}
    if (part := rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))) not in (None, 1):
        raise ConfigError(f"partial_rotary_factor is {part!r:.80}, expected 1: npllama rotates whole heads")
    theta = number(rope, "rope_theta") if "rope_theta" in rope else None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "dynamic":
        if report:
            report("rope_scaling: none (dynamic: it acts beyond max_position_embeddings alone, where npllama stops)")
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(number(rope, "factor"))
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        return theta, RopeScaling(number(rope, "factor"), low, high, whole(rope, "original_max_position_embeddings"))
    raise ConfigError(f"rope_type is {kind!r:.80}, expected default, linear, llama3 or dynamic")


# ------------------------------------------------------------------------------------------------------------------- weights


def interleaved_order(n_heads: int, head_dim: int) -> np.ndarray:
    """Return for each row of an interleaved wq or wk its row in the half-split one.    -> [n_heads · K]

    Head by head, row 2j + i comes from row j + i·K/2.
    """
    halves = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    return halves.swapaxes(1, 2).reshape(-1)


def _open_weights(index: Path, dtypes: Dtypes, report: Report) -> tuple[list[Path], Mapping[str, np.ndarray | None]]:
    """Return the files that hold weights, and every tensor in them by name, mapped; None for one that isn't a parameter."""
    if index.suffix != ".json":
        return [index], _open_file(index, dtypes, report)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index}: weight_map is {type(where).__name__}, expected tensors' files by name")
    for name, file in where.items():
        if not isinstance(file, str) or not checkpoint.is_plain_name(file):
            raise CheckpointError(f"{index}: {name!r:.80} is in {file!r:.80}, expected the name of a file in the same folder")
    files = sorted(set(where.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise CheckpointError(f"{index}: {missing[0]!r:.80} is missing" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    opened = {file: _open_file(index.parent / file, dtypes, report) for file in files}
    for name, file in where.items():
        if name not in opened[file]:
            raise CheckpointError(f"{index}: {name!r:.80} should be in {file}, which does not hold it")
    return [index, *(index.parent / file for file in files)], {name: opened[file][name] for name, file in where.items()}


def _open_shards(src: Path, dtypes: Dtypes, report: Report) -> tuple[list[Path], Mapping[str, np.ndarray | None]]:
    """Return the same as _open_weights() for shards without an index; they must be all of one model, without duplicates."""
    files = find_shards(src)
    if not files:
        raise CheckpointError(f"{src} has no weights: expected {', '.join(WEIGHTS)}")
    report(f"no index: the weights are those of {', '.join(file.name for file in files)}")
    found: dict[str, np.ndarray | None] = {}
    for file in files:
        tensors = _open_file(file, dtypes, report)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{file}: {twice[0]} is in another file already")
        found |= tensors
    return files, found


def find_shards(src: Path) -> list[Path]:
    """Return the shards of the one model in a folder without an index, in order; none if there are none."""
    models: dict[str, dict[int, Path]] = {}
    for path in src.iterdir():
        if shard := SHARD.fullmatch(path.name):
            models.setdefault(f"{shard[1]} of {shard[3]}{shard[4]}", {})[int(shard[2])] = path
        elif shard := TORCHTUNE.fullmatch(path.name):  # one for each epoch
            models.setdefault(f"epoch {shard[2]}", {})[int(shard[1])] = path
    if len(models) > 1:
        names = ", ".join(sorted(min(files.values()).name for files in models.values()))
        raise CheckpointError(f"{src} holds {len(models)} models, which begin with {names}: expected one, or an index")
    for files in models.values():
        first = min(files.values()).name
        shard = SHARD.fullmatch(first)
        n = int(shard[3]) if shard else max(files)
        if n > 100_000 or (missing := [i for i in range(1, n + 1) if i not in files]):
            raise CheckpointError(f"{src}: shard {missing[0] if n <= 100_000 else n} of {n} is missing, {first} is there")
        return [files[i] for i in sorted(files)]
    return []


def _tensor(found: np.ndarray | Quantised | Undone, order: np.ndarray | None) -> Tensor:
    """Return a parameter, its rows reordered if an order is given."""
    if isinstance(found, np.ndarray):
        return Tensor.of(np.atleast_1d(found), order)
    if isinstance(found, Undone):
        numbers, all_rows = found.rows, np.arange(found.shape[0]) if order is None else order
        double = np.dtype(np.float64)  # not a storage dtype: a --dtype must be chosen
        return Tensor(found.shape, double, lambda start, stop: numbers(all_rows[start:stop]), undone=found.what)
    rows = found.rows
    if order is None:
        return Tensor.of_grouped(found.shape, found.grouping, lambda start, stop: rows(slice(start, stop)))
    return Tensor.of_grouped(found.shape, found.grouping, lambda start, stop: rows(order[start:stop]))


def _open_file(path: Path, dtypes: Dtypes, report: Report) -> Mapping[str, np.ndarray | None]:
    if path.suffix == ".safetensors":
        return without_wrappers(path, read_safetensors(path, CheckpointError, dtypes=dtypes))
    return torch_file.arrays(path, torch_file.load(path, report))
