"""Write one model in other programs' formats, independently of the readers under test. Needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from npllama import Config, LinearRopeScaling, RopeScaling
from npllama.ops import rope_frequencies

Params = Mapping[str, np.ndarray]
HF_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
GGUF_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def renamed(params: Params, layer: Mapping[str, str], prefix: str, others: Mapping[str, str]) -> dict[str, np.ndarray]:
    found = {}
    for name, array in params.items():
        if name.startswith("layers."):
            _, i, rest = name.removesuffix(".weight").split(".", 2)
            found[f"{prefix}.{i}.{layer[rest]}.weight"] = array
        else:
            found[others[name]] = array
    return found


def half_split(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Permute wq or wk to Hugging Face's layout: of each head first the even rows, then the odd ones."""
    heads = np.split(weight, n_heads)
    return np.concatenate([part for head in heads for part in (head[0::2], head[1::2])])


def hf_tensors(config: Config, params: Params) -> dict[str, np.ndarray]:
    split = dict(params)
    for i in range(config.n_layers):
        for name, n_heads in (("wq", config.n_heads), ("wk", config.n_kv_heads)):
            key = f"layers.{i}.attention.{name}.weight"
            split[key] = half_split(split[key], n_heads)
    others = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    return renamed(split, HF_LAYER, "model.layers", others | {"output.weight": "lm_head.weight"})


def hf_config(config: Config, old: bool = False) -> dict[str, object]:
    """Return config.json as transformers 5 writes it, or with RoPE's keys of transformers 4."""
    rope: dict[str, object] = {"rope_type": "default"}
    if isinstance(scaling := config.rope_scaling, LinearRopeScaling):
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, RopeScaling):
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    values: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    if not old:
        return values | {"rope_parameters": rope | {"rope_theta": config.rope_theta}}
    if "factor" in rope and rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    return values | {"rope_theta": config.rope_theta, "rope_scaling": rope if config.rope_scaling else None}


def write_hf(
    folder: Path,
    config: Config,
    params: Params,
    dtype: str = "float32",
    n_shards: int = 1,
    old: bool = False,
    **changes: object,
) -> Path:
    """Write config.json and model.safetensors, or shards with an index; `changes` replace its keys, None removes one."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    tensors = hf_tensors(config, params)
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    tensors = {name: np.ascontiguousarray(array.astype(kinds[dtype])) for name, array in tensors.items()}
    values = {key: value for key, value in (hf_config(config, old) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::n_shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def rope_divisors(config: Config) -> np.ndarray:
    """Return rope_freqs.weight: the factor by which each pair's wavelength became longer."""
    shape = (config.head_dim, config.rope_theta)
    divisors = rope_frequencies(*shape, None, "float64") / rope_frequencies(*shape, config.rope_scaling, "float64")
    return divisors.astype(np.float32)


def gguf_tensors(params: Params) -> dict[str, np.ndarray]:
    others = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    return renamed(params, GGUF_LAYER, "blk", others | {"output.weight": "output.weight"})


def write_gguf(
    path: Path,
    config: Config,
    params: Params,
    kind: str = "F32",
    n_shards: int = 1,
    architecture: str = "llama",
    divisors: np.ndarray | None = None,
    raw: Mapping[str, tuple[np.ndarray, object]] | None = None,
    more: Params | None = None,
    **metadata: object,
) -> Path:
    """Write a GGUF file, matrices in this type and vectors in float32.

    divisors   rope_freqs.weight, instead of the one that follows from the config
    raw        tensors' blocks and type, instead of quantising them
    more       further tensors, in GGUF's names
    metadata   added by the writer's add_* methods, or under their keys, with __ for each dot
    """
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    tensors = gguf_tensors(params) | dict(more or {})
    per_shard = -(-len(tensors) // n_shards) if n_shards > 1 else 0
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_shard)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if isinstance(config.rope_scaling, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling and divisors is None:
        divisors = rope_divisors(config)
    if divisors is not None:
        tensors = {"rope_freqs.weight": divisors} | tensors
    for key, value in metadata.items():
        if hasattr(writer, f"add_{key}"):
            getattr(writer, f"add_{key}")(value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key.replace("__", "."), value)
    for name, array in tensors.items():
        if name in (raw or {}):
            blocks, of_raw = raw[name]
            writer.add_tensor(name, blocks, raw_dtype=of_raw)
        elif array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(array.astype(np.float32), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama2c(path: Path, config: Config, params: Params) -> Path:
    """Write a .bin of version 0."""
    sign = 1 if config.tied_embeddings else -1
    header = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    parts = [params["tok_embeddings.weight"]]
    for name in HF_LAYER:
        parts += [params[f"layers.{i}.{name}.weight"] for i in range(config.n_layers)]
    angles = np.outer(np.arange(config.max_seq_len), rope_frequencies(config.head_dim, config.rope_theta, None, "float32"))
    parts += [params["norm.weight"], np.cos(angles), np.sin(angles)]
    if not config.tied_embeddings:
        parts.append(params["output.weight"])
    data = struct.pack("<7i", *header, sign * config.vocab_size, config.max_seq_len)
    path.write_bytes(data + b"".join(part.astype("<f4").tobytes() for part in parts))
    return path
