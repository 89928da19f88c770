"""keras-hub's Llama on Keras' torch backend, in float32, from a folder of Hugging Face's."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import adapting
import keras_hub
import numpy as np

FOLDER = Path(sys.argv[1]) / "with-tokenizer"


def load(path):
    return keras_hub.models.Backbone.from_preset(adapting.with_tokenizer(path, FOLDER), dtype="float32")


def logits_of(backbone, tokens):
    inputs = {"token_ids": tokens[None].astype("int32"), "padding_mask": np.ones((1, len(tokens)), "int32")}
    hidden = backbone(inputs)
    return np.array(backbone.token_embedding(hidden, reverse=True).detach().numpy())[0]


def resolve_config(path):
    """Return the constants of the backbone that its converter makes of the file, without weights."""
    from keras_hub.src.utils.transformers import convert_llama3

    values = adapting.config_json(path)
    given = convert_llama3.convert_backbone_config(values)
    defaults = inspect.signature(convert_llama3.backbone_cls.__init__).parameters
    c = {name: parameter.default for name, parameter in defaults.items()} | given
    scaled = c["rope_frequency_adjustment_factor"]
    return {
        "norm_eps": c["layer_norm_epsilon"],
        "rope_theta": c["rope_max_wavelength"],
        "factor": scaled,
        "low_freq_factor": c["rope_low_freq_factor"] if scaled else 0,
        "high_freq_factor": c["rope_high_freq_factor"] if scaled else 0,
        "original_max_seq_len": c["rope_pretraining_sequence_length"] if scaled else 0,
        "dim": c["hidden_dim"],
        "n_layers": c["num_layers"],
        "n_heads": c["num_query_heads"],
        "n_kv_heads": c["num_key_value_heads"],
        "head_dim": c.get("head_dim") or c["hidden_dim"] // c["num_query_heads"],
        "ffn_dim": c["intermediate_dim"],
        "vocab_size": c["vocabulary_size"],
        "tied_embeddings": c["tie_word_embeddings"],
    }


def forward_file(path, tokens):
    return logits_of(load(path), tokens)


def trace(path, tokens):
    """Record every layer's output, by wrapping the classes' `__call__`: layers have no hooks."""
    backbone = load(path)
    layers = [layer for layer in backbone._flatten_layers() if layer is not backbone and layer.path]
    names, found = {id(layer): layer.path for layer in layers}, {}

    def watched(call):
        def wrapper(self, *args, **kwargs):
            y = call(self, *args, **kwargs)
            if id(self) in names and hasattr(y, "detach"):
                found.setdefault(names[id(self)], y.detach().numpy())  # the embedding is called again for the logits
            return y

        return wrapper

    calls = {kind: kind.__call__ for kind in {type(layer) for layer in layers}}
    for kind, call in calls.items():
        kind.__call__ = watched(call)
    try:
        logits = logits_of(backbone, tokens)
    finally:
        for kind, call in calls.items():
            kind.__call__ = call
    return found | {"logits": logits}


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("keras-hub", "keras", "torch"))
