"""torchtune's builders of Llama 2, 3.1 and 3.2, in float32. They read no config.json: the constants are given by hand."""

from __future__ import annotations

from pathlib import Path

import adapting
import torch
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2


def load(path, length=256):
    c = adapting.config_json(path)
    theta, scaling = adapting.rope_of(c)
    heads, dim = c["num_attention_heads"], c["hidden_size"]
    head_dim = c.get("head_dim") or dim // heads
    if head_dim * heads != dim:
        raise adapting.NotOffered("its heads are as wide as dim / n_heads")
    sizes = {
        "vocab_size": c["vocab_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads") or heads,
        "embed_dim": dim,
        "max_seq_len": length,
        "intermediate_dim": c["intermediate_size"],
        "norm_eps": c["rms_norm_eps"],
        "rope_base": int(theta),
    }
    if scaling:
        sizes["scale_factor"] = scaling["factor"]
    tied = c["tie_word_embeddings"]
    if tied and not scaling:
        raise adapting.NotOffered("its builder of tied models scales RoPE")
    model = (llama3_2 if tied else llama3_1 if scaling else llama2)(**sizes)
    weights = {name: x.float() for name, x in load_file(Path(path) / "model.safetensors").items()}
    model.load_state_dict(hf_to_tune(weights, heads, sizes["num_kv_heads"], dim, head_dim), strict=not tied)
    return model.eval()


@torch.inference_mode()
def forward_file(path, tokens):
    return load(path)(torch.from_numpy(tokens)[None])[0].float().numpy()


@torch.inference_mode()
def forward_at(path, tokens, positions):
    model = load(path, int(positions.max()) + 1)
    return model(torch.from_numpy(tokens)[None], input_pos=torch.from_numpy(positions)[None])[0].float().numpy()


_TOKENIZERS: dict = {}


def encode(path, text):
    from torchtune.models.llama2 import llama2_tokenizer
    from torchtune.models.llama3 import llama3_tokenizer

    if path not in _TOKENIZERS:
        sentencepiece = Path(path).read_bytes()[:1] == b"\n"
        _TOKENIZERS[path] = (llama2_tokenizer if sentencepiece else llama3_tokenizer)(path)
    return _TOKENIZERS[path].encode(text, add_bos=False, add_eos=False)


@torch.inference_mode()
def trace(path, tokens):
    model = load(path)
    found, _ = adapting.recording(model)
    logits = model(torch.from_numpy(tokens)[None])
    return found | {"logits": logits.float().numpy()}


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("torchtune", "torchao", "torch"))
