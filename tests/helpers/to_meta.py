"""Convert a model directory back to a torch checkpoint in Meta's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from npllama import checkpoint
from npllama.checkpoint.atomic import new_file, write_file
from npllama.config import Config
from npllama.engine.weights import Int8, widen
from npllama_convert.conversion import llama3_scaling
from npllama_convert.torch_file import import_torch

ROW_PARALLEL = ("attention.wo.weight", "feed_forward.w2.weight")  # split along their inputs, all others along their outputs


def to_meta(model: str | Path, dst: str | Path, shards: int = 1, embedding_axis: int = 0) -> None:
    """Write consolidated.NN.pth, params.json and tokenizer.model into the folder `dst`.

    shards          into how many files to split the weights
    embedding_axis  0 splits the embedding by rows as Llama 3 does, 1 by columns as LLaMA 1 and 2 do

    Tied embeddings are written once, as tok_embeddings. Raises ValueError where Meta's form can't say what the model has.
    """
    torch = import_torch()
    opened = checkpoint.open_model(model)
    dst = Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    if any(dst.glob("consolidated.*.pth")):
        raise ValueError(f"{dst} holds a checkpoint already")
    for shard in range(shards):
        state = {}
        for name, array in opened.params.items():
            array = widen(array) if isinstance(array, Int8) else array
            if array.ndim == 2:
                axis = split_axis(name, embedding_axis)
                if array.shape[axis] % shards:
                    raise ValueError(f"{name} {list(array.shape)} can't be split into {shards} along axis {axis}")
                array = np.split(array, shards, axis)[shard]
            if array.dtype == np.uint16:
                state[name] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
            else:
                state[name] = torch.from_numpy(array.copy())
        with new_file(dst / f"consolidated.{shard:02d}.pth") as file:
            torch.save(state, file)
    write_file(dst / "params.json", (json.dumps(to_params(opened.config)) + "\n").encode())
    generation = {key: opened.generation[key] for key in ("temperature", "top_p") if opened.generation[key] is not None}
    if generation:
        write_file(dst / "generation_config.json", (json.dumps(generation) + "\n").encode())
    if "tokenizer.model" in opened.manifest["files"]:
        write_file(dst / "tokenizer.model", (opened.path / "tokenizer.model").read_bytes())


def split_axis(name: str, embedding_axis: int) -> int:
    """Return the axis along which Meta splits a matrix into shards."""
    if name == "tok_embeddings.weight":
        return embedding_axis
    return 1 if name.endswith(ROW_PARALLEL) else 0


def to_params(config: Config) -> dict[str, object]:
    """Return the params.json that resolves to this config."""
    params = {key: getattr(config, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps")}
    params |= {"rope_theta": config.rope_theta, "max_seq_len": config.max_seq_len, "multiple_of": config.ffn_dim}
    if config.head_dim * config.n_heads != config.dim:
        params["head_dim"] = config.head_dim
    hidden = 8 * config.dim // 3
    if hidden > config.ffn_dim:  # scaled below ffn_dim, of which it is then rounded up to a multiple
        params["ffn_dim_multiplier"] = (config.ffn_dim - 0.5) / hidden
    if scaling := config.rope_scaling:
        if scaling != llama3_scaling(scaling.factor):
            raise ValueError(f"params.json can't say {scaling}")
        params["use_scaled_rope"] = True
    return params
