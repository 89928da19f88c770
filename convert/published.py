"""List published models: their params.json, and their published number of parameters.

Facts from the models' own params.json (LLaMA 1 to Llama 3.3, Code Llama) and config.json (the others, under the keys of
params.json).
vocab_size is -1 in the files of LLaMA 1 and 2: there `vocabulary` is the number of rows in their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Hold one model's params.json, and what is known about its weights."""

    params: Mapping[str, object]
    n_parameters: int  # tied embeddings counted once
    shards: int
    vocabulary: int
    max_seq_len: int
    tied: bool = False


def _llama1(dim: int, n_layers: int, n_heads: int, n_parameters: int, shards: int, norm_eps: float = 1e-6) -> Published:
    params = {"dim": dim, "multiple_of": 256, "n_heads": n_heads, "n_layers": n_layers, "norm_eps": norm_eps, "vocab_size": -1}
    return Published(params, n_parameters, shards, vocabulary=32000, max_seq_len=2048)


def _llama2(dim: int, n_layers: int, n_heads: int, n_parameters: int, shards: int, **grouped: object) -> Published:
    params = {"dim": dim, "multiple_of": 256, "n_heads": n_heads, "n_layers": n_layers, "norm_eps": 1e-5, "vocab_size": -1}
    return Published({**params, **grouped}, n_parameters, shards, vocabulary=32000, max_seq_len=4096)


def _code_llama(dim: int, n_layers: int, n_heads: int, n_parameters: int, shards: int, **more: object) -> Published:
    llama2 = _llama2(dim, n_layers, n_heads, n_parameters, shards, rope_theta=1000000.0, **more)
    return dataclasses.replace(llama2, vocabulary=32000 if "n_kv_heads" in more else 32016, max_seq_len=16384)


def _llama3(
    dim: int,
    n_layers: int,
    n_heads: int,
    multiplier: float,
    multiple_of: int,
    n_parameters: int,
    shards: int,
    scaled: bool = True,
    tied: bool = False,
) -> Published:
    params: dict[str, object] = {
        "dim": dim,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "n_layers": n_layers,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    if scaled:
        params["use_scaled_rope"] = True
    return Published(params, n_parameters, shards, 128256, 131072 if scaled else 8192, tied)


def _other(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    ffn_dim: int,
    vocabulary: int,
    rope_theta: float,
    max_seq_len: int,
    n_parameters: int,
    tied: bool,
) -> Published:
    params: dict[str, object] = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "hidden_dim": ffn_dim,
        "norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "vocab_size": vocabulary,
        "max_seq_len": max_seq_len,
    }
    return Published(params, n_parameters, 1, vocabulary, max_seq_len, tied)


PUBLISHED = {
    "LLaMA 7B": _llama1(4096, 32, 32, 6_738_415_616, 1),
    "LLaMA 13B": _llama1(5120, 40, 40, 13_015_864_320, 2),
    "LLaMA 30B": _llama1(6656, 60, 52, 32_528_943_616, 4),
    "LLaMA 65B": _llama1(8192, 80, 64, 65_285_660_672, 8, norm_eps=1e-5),
    "Llama 2 7B": _llama2(4096, 32, 32, 6_738_415_616, 1),
    "Llama 2 13B": _llama2(5120, 40, 40, 13_015_864_320, 2),
    "Llama 2 70B": _llama2(8192, 80, 64, 68_976_648_192, 8, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
    "Code Llama 7B": _code_llama(4096, 32, 32, 6_738_546_688, 1),
    "Code Llama 13B": _code_llama(5120, 40, 40, 13_016_028_160, 2),
    "Code Llama 34B": _code_llama(8192, 48, 64, 33_743_970_304, 4, n_kv_heads=8, ffn_dim_multiplier=1.0),
    "Llama 3 8B": _llama3(4096, 32, 32, 1.3, 1024, 8_030_261_248, 1, scaled=False),
    "Llama 3 70B": _llama3(8192, 80, 64, 1.3, 4096, 70_553_706_496, 8, scaled=False),
    "Llama 3.1 8B": _llama3(4096, 32, 32, 1.3, 1024, 8_030_261_248, 1),
    "Llama 3.1 70B": _llama3(8192, 80, 64, 1.3, 4096, 70_553_706_496, 8),
    "Llama 3.1 405B": _llama3(16384, 126, 128, 1.2, 4096, 405_853_388_800, 8),
    "Llama 3.2 1B": _llama3(2048, 16, 32, 1.5, 256, 1_235_814_400, 1, tied=True),
    "Llama 3.2 3B": _llama3(3072, 28, 24, 1.0, 256, 3_212_749_824, 1, tied=True),
    "Llama 3.3 70B": _llama3(8192, 80, 64, 1.3, 4096, 70_553_706_496, 8),
    "TinyLlama 1.1B": _other(2048, 22, 32, 4, 5632, 32000, 10000.0, 2048, 1_100_048_384, tied=False),
    "SmolLM2 135M": _other(576, 30, 9, 3, 1536, 49152, 100000.0, 8192, 134_515_008, tied=True),
    "SmolLM2 360M": _other(960, 32, 15, 5, 2560, 49152, 100000.0, 8192, 361_821_120, tied=True),
    "SmolLM2 1.7B": _other(2048, 24, 32, 32, 8192, 49152, 130000.0, 8192, 1_711_376_384, tied=True),
    "Mistral 7B v0.3": _other(4096, 32, 32, 8, 14336, 32768, 1000000.0, 32768, 7_248_023_552, tied=False),
}
