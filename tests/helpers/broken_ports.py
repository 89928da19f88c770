"""Ports with one mistake each: npllama's own forward pass with one operation, parameter or constant replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from npllama import Config, ops
from npllama.checkpoint import Model
from npllama.golden.precision import Precision, round_bfloat16
from npllama.model import PLAIN

import tiny


class Port(Precision):
    """A float32 forward pass with operations of its own; trace.json calls it float32."""

    def __init__(self, **replaced: Callable):
        super().__init__("float32")
        object.__setattr__(self, "replaced", dataclasses.replace(PLAIN, **replaced))

    def forward(self, params, config, tokens, cache=None, tap=None, last_only=False):
        from npllama.model import forward

        return forward(params, config, tokens, cache, tap, last_only, self.replaced)


class Bfloat16Port(Port):
    """Computes in bfloat16 where float32 was meant, and doesn't say so."""

    def forward(self, params, config, tokens, cache=None, tap=None, last_only=False):
        return Precision("bfloat16").forward(params, config, tokens, cache, tap, last_only)


def to_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def to_pairs(x: np.ndarray) -> np.ndarray:
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def rope_of_halves(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def with_heads(assign: Callable[[int, int], np.ndarray], queries: bool = True, values: bool = True) -> dict[str, Callable]:
    """Attention in which query head h uses key/value head assign(H, G)[h]."""

    def repeated(x: np.ndarray, H: int) -> np.ndarray:
        return x[..., assign(H, x.shape[-3]), :, :]

    def scores(q, keys, mask):
        return ops.attention_scores(q, repeated(keys, q.shape[-2]), mask)

    def heads(weights, values):
        return ops.attention_heads(weights, repeated(values, weights.shape[-3]))

    return ({"attention_scores": scores} if queries else {}) | ({"attention_heads": heads} if values else {})


def modulo(H: int, G: int) -> np.ndarray:
    return np.arange(H) % G


def unscaled_scores(q, keys, mask):
    return ops.attention_scores(q, keys, mask) * np.sqrt(np.asarray(q.shape[-1], q.dtype))


def later_rotation(positions, frequencies):
    return ops.rope_rotation(positions + 1, frequencies)


def no_mask(query_positions, slot_positions, dtype):
    return np.zeros_like(ops.causal_mask(query_positions, slot_positions, dtype))


def mask_off_by_one(query_positions, slot_positions, dtype):
    return ops.causal_mask(query_positions + 1, slot_positions, dtype)


def changed(
    params: dict[str, np.ndarray], ending: str, change: Callable[[str, np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(change(name, x)) if name.endswith(ending) else x for name, x in params.items()}


def read_transposed(name: str, weight: np.ndarray) -> np.ndarray:
    return weight.reshape(weight.shape[::-1]).T


def rows_in_halves(head_dim: int) -> Callable[[str, np.ndarray], np.ndarray]:
    def permute(name: str, weight: np.ndarray) -> np.ndarray:
        return to_halves(weight.reshape(-1, head_dim, weight.shape[1]).swapaxes(1, 2)).swapaxes(1, 2).reshape(weight.shape)

    return permute


def _scaled(config: Config, factor: float) -> Config:
    return dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, factor=factor))


def port(bug: str, model: Model) -> tuple[Model, Port]:
    """The model and the pass of a port that has this mistake."""
    config, params = model.config, model.params
    if bug in OPERATIONS:
        return model, Port(**OPERATIONS[bug])
    if bug == "bfloat16":
        return model, Bfloat16Port()
    if bug in CONSTANTS:
        return Model(CONSTANTS[bug](config), params), Port()
    return Model(config, PARAMETERS[bug](params, config)), Port()


OPERATIONS: dict[str, dict[str, Callable]] = {
    "half_split": {"rope": rope_of_halves},
    "no_rope": {"rope": lambda x, cos, sin: x},
    "no_mask": {"causal_mask": no_mask},
    "mask_off_by_one": {"causal_mask": mask_off_by_one},
    "position_off_by_one": {"rope_rotation": later_rotation},
    "grouped_modulo": with_heads(modulo),
    "grouped_modulo_values": with_heads(modulo, queries=False),
    "unscaled": {"attention_scores": unscaled_scores},
}
CONSTANTS: dict[str, Callable[[Config], Config]] = {
    "theta": lambda config: dataclasses.replace(config, rope_theta=2 * config.rope_theta),
    "eps": lambda config: dataclasses.replace(config, norm_eps=config.norm_eps / 10),
    "scale_factor": lambda config: _scaled(config, 8.0),
    "no_scaling": lambda config: dataclasses.replace(config, rope_scaling=None),
}
PARAMETERS: dict[str, Callable[[dict, Config], dict]] = {
    "transposed_square": lambda params, config: changed(params, "wq.weight", read_transposed),
    "transposed_w2": lambda params, config: changed(params, "w2.weight", read_transposed),
    "value_from_k": lambda params, config: changed(params, "wv.weight", lambda n, x: params[n.replace("wv", "wk")]),
    "bfloat16_weights": lambda params, config: changed(params, "wq.weight", lambda n, x: round_bfloat16(x)),
    "rows_in_halves": lambda params, config: changed(
        changed(params, "wq.weight", rows_in_halves(config.head_dim)), "wk.weight", rows_in_halves(config.head_dim)
    ),
}
BUGS = [*OPERATIONS, *CONSTANTS, *PARAMETERS, "bfloat16"]

# Scaled RoPE as Llama 3.2 has it, but for a short original context, so that 24 positions reach all three of its ranges.
SCALING = dataclasses.replace(tiny.LLAMA_3_2, original_max_seq_len=64)
CONFIG = tiny.config(rope_scaling=SCALING, max_seq_len=2048)


def tiny_model(seed: int = 1, **changes) -> Model:
    config = dataclasses.replace(CONFIG, **changes)
    return Model(config, tiny.random_params(config, seed))
