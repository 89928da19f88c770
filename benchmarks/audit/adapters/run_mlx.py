"""mlx-lm on the CPU, in float32."""

from __future__ import annotations

from pathlib import Path

import adapting
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.models.llama import ModelArgs
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


def load(path):
    model, _ = load_model(Path(path))
    model.set_dtype(mx.float32)
    return model


def plain(x):
    return np.array(x.astype(mx.float32))


def resolve_config(path):
    c = ModelArgs.from_dict(adapting.config_json(path))
    head_dim = c.head_dim or c.hidden_size // c.num_attention_heads  # as Attention does
    return adapting.constants(c, c.rope_theta, c.rope_scaling or {}, head_dim)


def forward_file(path, tokens):
    return plain(load(path)(mx.array(tokens)[None]))[0]


def forward_passes(path, passes, kept):
    model = load(path)
    cache = make_prompt_cache(model)
    feed = lambda tokens: plain(model(mx.array([tokens]), cache=cache))[0]  # noqa: E731
    return adapting.chunks(kept, passes, feed, lambda n: trim_prompt_cache(cache, cache[0].offset - n))


def trace(path, tokens):
    """Record every module's output, by wrapping the classes' `__call__`: modules have no hooks."""
    model = load(path)
    names = {id(module): name for name, module in model.named_modules() if name}
    found = {}

    def watched(call):
        def wrapper(self, *args, **kwargs):
            y = call(self, *args, **kwargs)
            if id(self) in names and isinstance(y, mx.array):
                found[names[id(self)]] = y
            return y

        return wrapper

    kinds = {type(module) for module in model.modules()}
    calls = {kind: kind.__call__ for kind in kinds}
    for kind, call in calls.items():
        kind.__call__ = watched(call)
    try:
        logits = model(mx.array(tokens)[None])
        found.setdefault("lm_head", logits)  # where the embeddings are tied
        return {name: plain(x) for name, x in found.items()}
    finally:
        for kind, call in calls.items():
            kind.__call__ = call


if __name__ == "__main__":
    adapting.run(globals(), "safetensors", ("mlx-lm", "mlx", "transformers"))
