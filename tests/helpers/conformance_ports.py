"""Ports for the conformance suite: npllama's own functions under the operations' names, and torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllama import model, ops
from npllama.engine.weights import Int8
from npllama.golden.conformance.operations import scaling_of
from npllama.golden.precision import profile, round_bfloat16, round_float16

Functions = dict[str, Callable[..., Any]]


def npllama_functions(name: str) -> Functions:
    """npllama's operations as they are called in a pass, in a profile of precision.py; packed weights as they are stored."""
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
    }
    if precision.name != "float64":  # in which packed weights are not computed
        functions["linear_bfloat16"] = lambda x, weight: r(o.linear(x, weight))
        functions["linear_int8"] = lambda x, weight, scale: r(o.linear(x, Int8(weight, scale)))
    return functions


def torch_functions(torch: Any) -> Functions:
    """torch's own operations, where it has one; arrays in, tensors out."""
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
