"""Meta's llama-models: the Transformer of llama3/model.py in one process, with stand-ins for fairscale's parallel layers.

The feed-forward's size follows from params.json by a formula. The suite's tiny models name the size instead: it becomes the
multiple that the formula rounds up to.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import adapting
import torch
from torch import nn


def stand_ins() -> None:
    def linear(n_in, n_out, **_options):
        return nn.Linear(n_in, n_out, bias=False)

    names = ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel")
    modules = {name: ModuleType(name) for name in names}
    initialize = modules[f"{names[-1]}.initialize"] = ModuleType(f"{names[-1]}.initialize")
    layers = modules[f"{names[-1]}.layers"] = ModuleType(f"{names[-1]}.layers")
    initialize.get_model_parallel_world_size = lambda: 1
    layers.ColumnParallelLinear = layers.RowParallelLinear = linear
    layers.VocabParallelEmbedding = lambda n, dim, **_options: nn.Embedding(n, dim)
    modules[names[-1]].initialize = initialize
    sys.modules.update(modules)


stand_ins()
from llama_models.llama3.args import ModelArgs  # noqa: E402
from llama_models.llama3.model import Transformer  # noqa: E402

LLAMA_3_VOCABULARY = 128256


def arguments(path):
    values = json.loads(Path(path).read_text())
    heads = values["n_heads"]
    if values["dim"] % heads or values.get("head_dim", values["dim"] // heads) != values["dim"] // heads:
        raise adapting.NotOffered("its heads are as wide as dim / n_heads")
    if "hidden_dim" in values and "multiple_of" not in values:
        values |= {"multiple_of": values["hidden_dim"], "ffn_dim_multiplier": 1.5 / int(8 * values["dim"] / 3)}
    return ModelArgs(**values)


def resolve_config(path):
    c = arguments(path)
    if c.vocab_size != LLAMA_3_VOCABULARY:
        raise adapting.NotOffered("build() in its llama3/generation.py asserts Llama 3's vocabulary")
    width = int(2 * 4 * c.dim / 3)
    width = width if c.ffn_dim_multiplier is None else int(c.ffn_dim_multiplier * width)
    scaling = (8, 1, 4, 8192) if c.use_scaled_rope else (0, 0, 0, 0)  # apply_scaling() in model.py has them as constants
    return {
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        **dict(zip(("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"), scaling, strict=True)),
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "head_dim": c.dim // c.n_heads,
        "ffn_dim": c.multiple_of * math.ceil(width / c.multiple_of),
        "vocab_size": c.vocab_size,
    }


def load(path):
    c = arguments(Path(path) / "params.json")
    c.max_batch_size, c.max_seq_len = 1, 256
    state = torch.load(Path(path) / "consolidated.00.pth", weights_only=True, map_location="cpu")
    if "output.weight" not in state:  # tied
        state["output.weight"] = state["tok_embeddings.weight"]
    model = Transformer(c)
    model.load_state_dict({name: x.float() for name, x in state.items()})
    return model.eval()


def forward_file(path, tokens):
    return load(path)(torch.from_numpy(tokens)[None], 0)[0].numpy()


def forward_passes(path, passes, kept):
    model, at = load(path), [0]

    def feed(tokens):
        logits = model(torch.tensor([tokens]), at[0])[0]
        at[0] += len(tokens)
        return logits

    return adapting.chunks(kept, passes, feed, lambda n: at.__setitem__(0, n))


def trace(path, tokens):
    model = load(path)
    found, _ = adapting.recording(model)
    model(torch.from_numpy(tokens)[None], 0)
    return found


_TOKENIZERS: dict = {}


def encode(path, text):
    from llama_models.llama3.tokenizer import Tokenizer

    if Path(path).read_bytes()[:1] == b"\n":
        raise adapting.NotOffered("llama-models has Llama 3's tokenizer alone")
    if path not in _TOKENIZERS:
        _TOKENIZERS[path] = Tokenizer(Path(path))
    return _TOKENIZERS[path].encode(text, bos=False, eos=False)


if __name__ == "__main__":
    adapting.run(globals(), "pth", ("llama-models", "torch"))
