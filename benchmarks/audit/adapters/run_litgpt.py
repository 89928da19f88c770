"""litgpt's GPT, in float32. It knows models by name and reads no config.json: the constants are given to its Config by hand."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import adapting
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file


def load(path):
    c = adapting.config_json(path)
    theta, scaling = adapting.rope_of(c)
    heads = c["num_attention_heads"]
    adjustments = scaling and {
        "factor": scaling["factor"],
        "low_freq_factor": scaling["low_freq_factor"],
        "high_freq_factor": scaling["high_freq_factor"],
        "original_max_seq_len": scaling["original_max_position_embeddings"],
    }
    config = Config(
        name="audited",
        block_size=256,
        vocab_size=c["vocab_size"],
        padded_vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"],
        n_head=heads,
        n_query_groups=c.get("num_key_value_heads") or heads,
        head_size=c.get("head_dim") or c["hidden_size"] // heads,
        n_embd=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        rope_base=int(theta),
        rope_adjustments=adjustments,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    weights, state = load_file(Path(path) / "model.safetensors"), {}
    copy_weights_hf_llama(config, defaultdict(dict), state, weights)
    model = GPT(config)
    model.load_state_dict({name: x.float() for name, x in state.items()})
    return model.eval()


@torch.inference_mode()
def forward_file(path, tokens):
    return load(path)(torch.from_numpy(tokens)[None])[0].numpy()


@torch.inference_mode()
def forward_passes(path, passes, kept):
    model = load(path)
    model.set_kv_cache(batch_size=1)
    at = [0]

    def feed(tokens):
        positions = torch.arange(at[0], at[0] + len(tokens))
        at[0] += len(tokens)
        return model(torch.tensor([tokens]), positions)[0]

    return adapting.chunks(kept, passes, feed, lambda n: at.__setitem__(0, n))


@torch.inference_mode()
def trace(path, tokens):
    model = load(path)
    found, _ = adapting.recording(model)
    model(torch.from_numpy(tokens)[None])
    return found


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("litgpt", "torch"))
