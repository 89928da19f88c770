"""Make ports with one mistake each, and the tiny model in which most mistakes of npllama.golden.mistakes show."""

from __future__ import annotations

import dataclasses

from npllama.checkpoint import Model
from npllama.golden.mistakes import MISTAKES, Port

import tiny

# Those that compare's tests plant one by one.
BUGS = (
    *("half_split", "no_rope", "no_mask", "mask_one_late", "position_1_late", "keys_and_values_tiled", "values_tiled"),
    *("unscaled", "theta_500000", "eps", "scale_factor", "no_scaling", "transposed", "value_from_k", "rows_in_halves"),
    *("bfloat16_weights", "bfloat16"),
)


def port(name: str, model: Model) -> tuple[Model, Port]:
    """Return the model and the forward function of a port with this mistake, which must be visible in that model."""
    assert MISTAKES[name].applies(model.config), name
    return model, Port(name)


def only(name: str, model: Model, ending: str) -> Model:
    """Return the model with a mistake in only those parameters whose names end with a suffix."""
    wrong = MISTAKES[name].params(model.params, model.config)
    return Model(model.config, {n: wrong[n] if n.endswith(ending) else x for n, x in model.params.items()})


# Scaled RoPE as in Llama 3.2, but with a short original context, so that 24 positions reach all three of its ranges.
SCALING = dataclasses.replace(tiny.LLAMA_3_2, original_max_seq_len=64)
CONFIG = tiny.config(rope_scaling=SCALING, max_seq_len=2048)


def tiny_model(seed: int = 1, **changes) -> Model:
    config = dataclasses.replace(CONFIG, **changes)
    return Model(config, tiny.random_params(config, seed))
