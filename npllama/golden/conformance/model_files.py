"""Write the tiny models in the forms that loaders read, each the same bytes on every machine, written without torch.

| form | files | weights | rows of wq and wk |
|---|---|---|---|
| safetensors | config.json, model.safetensors | bfloat16 | in Hugging Face's order, halves |
| gguf | model.gguf | float32 | adjacent pairs |
| pth | params.json, consolidated.00.pth | bfloat16 | adjacent pairs |
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...config import Config, LinearRopeScaling, RopeScaling
from ...ops import rope_frequencies
from .arrays import little, safetensors
from .models import MODELS, TinyModel

FORMS = ("safetensors", "gguf", "pth")
HF_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "attention_norm.weight": "attn_norm.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}


def forms_of(model: TinyModel) -> tuple[str, ...]:
    """Return the forms that can state all of a model's constants: params.json has no scale factor, and implies 8."""
    scaling = model.config.rope_scaling
    return FORMS if scaling is None or scaling.factor == 8 else FORMS[:2]


def path_of(model: TinyModel, form: str) -> str:
    """Return the path that a loader gets: a folder, or a .gguf file."""
    return f"models/{model.name}/model.gguf" if form == "gguf" else f"models/{model.name}/{form}"


def model_at(path: str) -> TinyModel:
    """Return the model of such a path."""
    return MODELS[path.split("/")[1]]


def files_of(model: TinyModel, form: str) -> dict[str, bytes]:
    """Return the files of a form, by their paths in the suite."""
    path = path_of(model, form)
    if form == "gguf":
        return {path: gguf(gguf_metadata(model.config), gguf_tensors(model.params), rope_divisors(model.config))}
    if form == "pth":
        weights = {name: bfloat16(x) for name, x in model.params.items()}
        return {f"{path}/params.json": as_json(meta_params(model.config)), f"{path}/consolidated.00.pth": torch_zip(weights)}
    halves = {name: in_halves(x, name, model.config) for name, x in model.params.items()}
    weights = {name: bfloat16(x) for name, x in _named(halves, HF_NAMES, "model.layers").items()}
    return {f"{path}/config.json": as_json(hf_config(model.config)), f"{path}/model.safetensors": safetensors(weights)}


def write(model: TinyModel, form: str, folder: Path) -> Path:
    """Write a form's files below a folder, and return what a loader is given."""
    for path, data in files_of(model, form).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder / path_of(model, form)


def as_json(value: object) -> bytes:
    """Return JSON as it is written in the suite."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of numbers that are exact in bfloat16.    uint16"""
    return (np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def in_halves(x: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Reorder the rows of wq and wk to Hugging Face's halves, head by head: row 2j + i goes to i·K/2 + j."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return x
    return x.reshape(-1, config.head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def _named(params: Mapping[str, np.ndarray], names: Mapping[str, str], layers: str) -> dict[str, np.ndarray]:
    found = {}
    for name, x in params.items():
        in_layer = re.match(r"layers\.(\d+)\.", name)
        found[f"{layers}.{in_layer[1]}.{names[name[in_layer.end() :]]}" if in_layer else names[name]] = x
    return found


# ------------------------------------------------------------------------------------------------------------------ constants


def hf_config(config: Config, old: bool = False) -> dict[str, object]:
    """Return Hugging Face's config.json, as transformers 5 writes it, or as older versions did."""
    scaling: dict[str, object] = {"rope_type": "default"}
    if isinstance(config.rope_scaling, LinearRopeScaling):
        scaling = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    elif isinstance(config.rope_scaling, RopeScaling):
        s = config.rope_scaling
        scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        scaling |= {"high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_seq_len}
    rope: dict[str, object] = {"rope_parameters": {"rope_theta": config.rope_theta, **scaling}, "dtype": "bfloat16"}
    if old:
        rope = {
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling if config.rope_scaling else None,
            "torch_dtype": "bfloat16",
        }
    return {
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
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_embeddings,
        **rope,
    }


def meta_params(config: Config) -> dict[str, object]:
    """Return params.json, with the sizes that Meta's files leave to formulas."""
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": config.rope_scaling is not None,
        "max_seq_len": config.max_seq_len,
    }


def gguf_metadata(config: Config) -> dict[str, str | int | float]:
    """Return the metadata of a GGUF file; a float becomes float32."""
    return {
        "general.architecture": "llama",
        "general.name": "npllama conformance",
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }


def gguf_tensors(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the parameters under their names in a GGUF file."""
    return _named(params, GGUF_NAMES, "blk")


def rope_divisors(config: Config) -> dict[str, np.ndarray]:
    """Return the tensor by which a GGUF file says Llama 3.1's scaling: what each frequency is divided by."""
    if not isinstance(config.rope_scaling, RopeScaling):
        return {}
    plain, scaled = (rope_frequencies(config.head_dim, config.rope_theta, s, "float64") for s in (None, config.rope_scaling))
    return {"rope_freqs.weight": (plain / scaled).astype(np.float32)}


# ---------------------------------------------------------------------------------------------------------------------- formats


def gguf(metadata: Mapping[str, str | int | float], weights: Mapping[str, np.ndarray], more: Mapping[str, np.ndarray]) -> bytes:
    """Return a GGUF file, version 3, of float32 tensors.    The GGUF specification: ggml, docs/gguf.md"""
    tensors = {**weights, **more}

    def text(x: str) -> bytes:
        return struct.pack("<Q", len(x.encode())) + x.encode()

    def value(x: str | int | float) -> bytes:
        if isinstance(x, str):
            return struct.pack("<I", 8) + text(x)
        return struct.pack("<If", 6, x) if isinstance(x, float) else struct.pack("<II", 4, x)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(x) for key, x in metadata.items())
    data = b""
    for name, x in tensors.items():
        head += text(name) + struct.pack(f"<I{x.ndim}QIQ", x.ndim, *x.shape[::-1], 0, len(data))  # 0: F32
        data += little(x.astype(np.float32)) + b"\0" * (-4 * x.size % 32)
    return head + b"\0" * (-len(head) % 32) + data


def torch_zip(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return what torch.save writes for a dict of bfloat16 tensors, given as uint16; torch.load(weights_only=True) reads it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # as on Unix, wherever it is written
            # The data begins at a multiple of 64 bytes, as torch writes it; before it are 30 bytes, the name and this.
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(info, data)

        add("data.pkl", _pickle(tensors))
        add("byteorder", b"little")
        for i, x in enumerate(tensors.values()):
            add(f"data/{i}", little(x))
        add("version", b"3\n")
    return file.getvalue()


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the pickle of the dict, of protocol 2: each tensor is rebuilt from a storage that stands in another member."""

    def text(x: str) -> bytes:
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()

    def whole(*numbers: int) -> bytes:
        return b"".join(b"J" + struct.pack("<i", n) for n in numbers)

    parts = [b"\x80\x02}("]
    for i, (name, x) in enumerate(tensors.items()):
        strides = [int(np.prod(x.shape[axis + 1 :])) for axis in range(x.ndim)]
        storage = b"(" + text("storage") + b"ctorch\nBFloat16Storage\n" + text(str(i)) + text("cpu") + whole(x.size) + b"tQ"
        rest = whole(0) + b"(" + whole(*x.shape) + b"t(" + whole(*strides) + b"t\x89ccollections\nOrderedDict\n)R"
        parts.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR")
    return b"".join(parts) + b"u."
