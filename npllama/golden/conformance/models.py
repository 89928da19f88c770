"""Make the tiny models of levels L2 to L5: random weights, exact in bfloat16, and constants that reveal mistakes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from ...config import Config, RopeScaling, parameter_shapes
from .numbers import Floats

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)  # Llama 3.1's
GROUPED = Config(
    dim=42,  # a multiple of n_heads: transformers requires that even if head_dim isn't dim / n_heads
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=52,
    vocab_size=61,
    norm_eps=0.25,
    rope_theta=10000.0,
    rope_scaling=None,
    max_seq_len=131072,
    tied_embeddings=False,
)


@dataclass(frozen=True, eq=False)
class TinyModel:
    """Describe a model of the suite.

    name     the name of its folder
    purpose  what it tests
    """

    name: str
    purpose: str
    config: Config

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        """Return its parameters in Meta's names and layout.    float32"""
        return params_of(self.config, f"models/{self.name}")


def params_of(config: Config, text: str, embeddings: int = 0, matrices: int = -3) -> dict[str, np.ndarray]:
    """Draw a model's parameters: norms between 1/2 and 3/2, the others of the magnitude that the exponents give (Floats).

    By default, a product with a matrix is about as large as its input.
    """
    params = {}
    for name, shape in parameter_shapes(config).items():
        norm = len(shape) == 1
        drawn = Floats(shape, -2, 6, above=1.0) if norm else Floats(shape, embeddings if "embeddings" in name else matrices)
        params[name] = drawn.draw(f"{text}/{name}")
    return params


MODELS = {
    model.name: model
    for model in (
        TinyModel(
            *("llama_1", "every head has its own keys and values, and wq is square"),
            replace(GROUPED, dim=32, n_heads=4, n_kv_heads=4, ffn_dim=44, norm_eps=0.125),
        ),
        TinyModel("grouped", "grouped queries, H/G = 3; n_heads · head_dim is not dim", GROUPED),
        TinyModel(
            *("tied", "the output matrix is the embedding; one key head for all; θ of Llama 3"),
            replace(GROUPED, n_layers=1, n_heads=8, n_kv_heads=1, dim=48, rope_theta=500000.0, tied_embeddings=True),
        ),
        TinyModel(
            *("scaled_8", "Llama 3.1's scaling of RoPE, over enough positions to show"),
            replace(GROUPED, dim=44, head_dim=16, n_heads=4, rope_theta=500000.0, rope_scaling=SCALING),
        ),
        TinyModel(
            *("scaled_32", "Llama 3.2's: scale factor 32, where Meta's code has 8"),
            replace(
                GROUPED, head_dim=16, n_heads=3, n_kv_heads=1, rope_theta=500000.0, rope_scaling=replace(SCALING, factor=32.0)
            ),
        ),
    )
}
