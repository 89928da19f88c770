"""Ports for the conformance suite: npllama's own functions and torch's, under the operations' names."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npllama import Config, KVCache, model, ops
from npllama.checkpoint.foreign import read_json
from npllama.engine.weights import Int8, widen
from npllama.golden.conformance.config_files import constants_of
from npllama.golden.conformance.operations import scaling_of
from npllama.golden.precision import Precision, profile, round_bfloat16, round_float16
from npllama.sampling import Sampling, probabilities
from npllama.scope import Scope
from npllama_convert import gguf, huggingface, meta

import tiny

Functions = dict[str, Callable[..., Any]]


def npllama_functions(name: str) -> Functions:
    """Return npllama's operations as forward() calls them, in a rounding profile; packed weights stay packed."""
    precision = profile(name)
    o, r, dtype = precision.ops or model.PLAIN, precision.round, precision.dtype

    def frequencies(head_dim: int, theta: float, scaling: dict | None) -> np.ndarray:
        return o.rope_frequencies(head_dim, theta, scaling_of(scaling), dtype)

    def rope_at(x: np.ndarray, positions: np.ndarray, theta: float, scaling: dict | None) -> np.ndarray:
        return r(o.rope(x, *o.rope_rotation(positions, frequencies(x.shape[-1], theta, scaling))))

    functions: Functions = {
        "embed": o.embed,
        "linear": lambda x, weight: r(o.linear(x, weight)),
        "rms_norm": lambda x, weight, eps: r(o.rms_norm(x, weight, eps)),
        "softmax": lambda x: r(o.softmax(x)),
        "silu": lambda x: r(ops.silu(x)),
        "swiglu": lambda gate, up: r(o.swiglu(gate, up)),
        "rope_frequencies": frequencies,
        "rope_rotation": o.rope_rotation,
        "rope": lambda x, cos, sin: r(o.rope(x, cos, sin)),
        "rope_at": rope_at,
        "causal_mask": lambda q, s: o.causal_mask(q, s, dtype),
        "attention_scores": lambda q, keys, mask: r(o.attention_scores(q, keys, mask)),
        "attention_heads": lambda weights, values: r(o.attention_heads(weights, values)),
        "round_bfloat16": round_bfloat16,
        "round_float16": round_float16,
        "resolve_config": resolve_config,
        "probabilities": filtered,
    }
    functions |= _whole_functions(precision)
    if precision.name != "float64":  # in which packed weights are not computed
        functions["linear_bfloat16"] = lambda x, weight: r(o.linear(x, weight))
        functions["linear_int8"] = lambda x, weight, scale: r(o.linear(x, Int8(weight, scale)))
    return functions


def _whole_functions(precision: Precision) -> Functions:
    """Return blocks and models: model.py's functions, with the cache and the loaders."""
    o, r = precision.ops or model.PLAIN, precision.round

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        return r(x)

    def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        config = tiny.config()
        return model.attention(q, keys, values, mask, Scope({}, config, KVCache(config), o, tap))

    def feed_forward(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> np.ndarray:
        config, params = tiny.config(), {"w1.weight": w1, "w2.weight": w2, "w3.weight": w3}
        return model.feed_forward(x, Scope(params, config, KVCache(config), o, tap))

    def block(x: np.ndarray, positions: np.ndarray, params: dict, config: dict) -> np.ndarray:
        constants = Config.from_dict(config)
        cache = KVCache(constants)
        places = cache.extend(np.ones(len(x), bool))
        s = Scope({f"layers.0.{name}": w for name, w in params.items()}, constants, cache, o, tap).in_layer(0)
        frequencies = o.rope_frequencies(constants.head_dim, constants.rope_theta, constants.rope_scaling, x.dtype)
        mask = o.causal_mask(places, cache.positions, x.dtype)
        return model.block(x, o.rope_rotation(positions, frequencies), mask, s)

    def forward(params: dict, config: dict, tokens: np.ndarray) -> np.ndarray:
        return precision.forward(params, Config.from_dict(config), tokens)

    def forward_at(params: dict, config: dict, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        at = dataclasses.replace(o, rope_rotation=lambda _, frequencies: o.rope_rotation(positions, frequencies))
        return model.forward(params, Config.from_dict(config), tokens, tap=tap, ops=at)

    def forward_file(path: str, tokens: np.ndarray) -> np.ndarray:
        if path.endswith(".gguf"):
            source = gguf.read(Path(path), lambda line: None)
        elif path.endswith("safetensors"):
            source = huggingface.read(Path(path), lambda line: None)
        elif importlib.util.find_spec("torch"):
            source = meta.read(path, report=lambda line: None)
        else:
            raise NotImplementedError  # npllama reads it with torch
        params = {name: np.concatenate(list(tensor.blocks())) for name, tensor in source.tensors.items()}
        params = {name: widen(x).astype(precision.dtype) for name, x in params.items()}
        return precision.forward(params, source.config, tokens)

    def forward_passes(params: dict, config: dict, passes: list, kept: list) -> np.ndarray:
        constants, found = Config.from_dict(config), []
        cache = KVCache(constants, np.shape(passes[0])[:-1])
        for tokens, keep in itertools.zip_longest(passes, kept):
            if keep is not None:
                cache.truncate(keep)
            rows = np.any(np.asarray(tokens) >= 0, axis=-1)
            found.append(precision.forward(params, constants, tokens, cache if rows.all() else cache.only(rows)))
        return np.concatenate(found, axis=-2)

    made = (attention, feed_forward, block, forward, forward_at, forward_file, forward_passes)
    return {function.__name__: function for function in made}


def resolve_config(path: str) -> np.ndarray:
    """Read a file that states constants with the converter's readers."""

    def silent(line: str) -> None:
        pass

    if path.endswith(".gguf"):
        metadata, tensors = gguf.open_file(Path(path))
        return constants_of(gguf.resolve(metadata, tensors, silent))
    values = read_json(Path(path), ValueError)
    if path.endswith("params.json"):
        vocab_size = 32000 if values["vocab_size"] == -1 else None
        return constants_of(meta.resolve(values, vocab_size=vocab_size, report=silent))
    return constants_of(huggingface.resolve(values, bool(values["tie_word_embeddings"]), silent))


def filtered(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Return the distribution that npllama samples from."""
    return probabilities(logits, Sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p))


def torch_functions(torch: Any) -> Functions:
    """Return torch's own operations, where it has one; arrays in, tensors out."""
    functional = torch.nn.functional

    def on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: function(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in given))

    def shared(heads: int, x: Any) -> Any:
        return x.repeat_interleave(heads // x.shape[-3], dim=-3)

    def attention_scores(q: Any, keys: Any, mask: Any) -> Any:
        q = q.transpose(-2, -3)
        return q @ shared(q.shape[-3], keys).transpose(-1, -2) * q.shape[-1] ** -0.5 + mask

    def rope(x: Any, cos: Any, sin: Any) -> Any:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)

    def rope_half_split(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return x * torch.cat((cos, cos), dim=-1) + rotated * torch.cat((sin, sin), dim=-1)

    functions = {
        "embed": functional.embedding,
        "linear": functional.linear,
        "linear_bfloat16": lambda x, weight: functional.linear(x, weight.view(torch.bfloat16).to(x.dtype)),
        "linear_int8": lambda x, weight, scale: functional.linear(x, weight.to(x.dtype) * scale[:, None]),
        "linear_groups": lambda x, weight, scale: functional.linear(
            x, (weight.unflatten(-1, (-1, 32)).to(x.dtype) * scale[..., None]).flatten(-2)
        ),
        "rms_norm": lambda x, weight, eps: functional.rms_norm(x, weight.shape, weight, eps),
        "softmax": lambda x: functional.softmax(x, dim=-1),
        "silu": functional.silu,
        "swiglu": lambda gate, up: functional.silu(gate) * up,
        "rope": rope,
        "rope_half_split": rope_half_split,
        "attention_scores": attention_scores,
        "attention_heads": lambda weights, values: (weights @ shared(weights.shape[-3], values)).transpose(-2, -3),
        "round_bfloat16": lambda x: x.bfloat16().float(),
        "round_float16": lambda x: x.half().float(),
    }
    return {name: on_tensors(function) for name, function in functions.items()}
