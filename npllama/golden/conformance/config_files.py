"""Level L0: the files in which models state their constants, and the constants that a loader must return.

`constants` is a vector, so that a port in any language can write it, in the order of CONSTANTS. Where a file doesn't
state a constant, the vector has NaN, and any number is right.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...config import Config, RopeScaling
from .model_files import as_json, gguf, gguf_metadata, hf_config, rope_divisors
from .models import SCALING

CONSTANTS = (
    *("norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "tied_embeddings"),
)


def constants_of(config: Config) -> np.ndarray:
    """Return the vector; the four numbers of RoPE's scaling are 0 without one, the last three also in a linear one.    [14]"""
    scaling = vars(config.rope_scaling) if config.rope_scaling else {}
    return np.array([float(scaling.get(name, getattr(config, name, 0))) for name in CONSTANTS])


def vector_of(found: Mapping[str, Any]) -> np.ndarray:
    """Return the vector from a mapping of names to constants; those of a scaling may be under `rope_scaling`."""
    scaling = found.get("rope_scaling") or {}
    return np.array([float(scaling.get(name, found.get(name, 0))) for name in CONSTANTS])


@dataclass(frozen=True, eq=False)
class ConfigFile:
    """Describe a file that states constants.

    path     in the suite
    purpose  what it tests
    config   the constants that it states
    data     its bytes
    unsaid   constants that it doesn't state: they follow from the weights, or are unknown
    """

    path: str
    purpose: str
    config: Config
    data: bytes
    unsaid: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """Return 1 for each constant that it states, NaN for the others.    [14]"""
        return np.array([math.nan if name in self.unsaid else 1.0 for name in CONSTANTS])


LLAMA_2_7B = Config(4096, 32, 32, 32, 128, 11008, 32000, 1e-5, 10000.0, None, 4096, False)
LLAMA_1_7B = replace(LLAMA_2_7B, norm_eps=1e-6, max_seq_len=2048)
LLAMA_2_70B = replace(LLAMA_2_7B, dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672)
LLAMA_3_8B = replace(LLAMA_2_7B, n_kv_heads=8, ffn_dim=14336, vocab_size=128256, rope_theta=500000.0, max_seq_len=8192)
LLAMA_3_1_8B = replace(LLAMA_3_8B, rope_scaling=SCALING, max_seq_len=131072)
LLAMA_3_2_1B = replace(
    replace(LLAMA_3_1_8B, dim=2048, n_layers=16, head_dim=64, ffn_dim=8192, tied_embeddings=True),
    rope_scaling=replace(SCALING, factor=32.0),
)
WIDE = replace(LLAMA_3_8B, dim=5120, n_layers=40, rope_theta=1000000.0)  # as Mistral Nemo: head_dim is not dim / n_heads


def _hf(name: str, purpose: str, config: Config, old: bool, without: tuple[str, ...] = (), **changes: Any) -> ConfigFile:
    values = {key: value for key, value in (hf_config(config, old) | changes).items() if key not in without}
    return ConfigFile(f"L0/resolve_config/{name}/config.json", purpose, config, as_json(values))


def _meta(name: str, purpose: str, config: Config, unsaid: tuple[str, ...] = (), **values: Any) -> ConfigFile:
    shape = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
    path = f"L0/resolve_config/{name}/params.json"
    return ConfigFile(path, purpose, config, as_json(shape | values), ("tied_embeddings", *unsaid))


def _gguf(name: str, purpose: str, config: Config) -> ConfigFile:
    unsaid = ["tied_embeddings"]  # by the tensor output.weight, and here are no weights
    if isinstance(config.rope_scaling, RopeScaling):  # by divisors, of which the largest is the factor
        unsaid += ["low_freq_factor", "high_freq_factor", "original_max_seq_len"]
    data = gguf(gguf_metadata(config), {}, rope_divisors(config))
    return ConfigFile(f"L0/resolve_config/{name}/model.gguf", purpose, config, data, tuple(unsaid))


@functools.cache
def config_files() -> dict[str, ConfigFile]:
    """Return them by their paths."""
    old, new = "config.json as transformers wrote it before version 5", "config.json as transformers 5 writes it"
    theta = "rope_theta and the scaling in rope_parameters"
    grouped: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
    # fmt: off
    made = [
        _hf("hf_llama_1", f"{old}, without num_key_value_heads, head_dim and rope_theta; eps 1e-6", LLAMA_1_7B, True,
            ("num_key_value_heads", "head_dim", "rope_theta")),
        _hf("hf_llama_2", f"{old}: head_dim follows from hidden_size", LLAMA_2_7B, True, ("head_dim",)),
        _hf("hf_llama_3", f"{old}: θ and grouped queries", LLAMA_3_8B, True, ("head_dim",)),
        _hf("hf_llama_3_1", f"{old}: rope_scaling of type llama3", LLAMA_3_1_8B, True, ("head_dim",)),
        _hf("hf_llama_3_1_new", f"{new}: {theta}", LLAMA_3_1_8B, False),
        _hf("hf_llama_3_2_new", f"{new}: {theta}, factor 32; tied", LLAMA_3_2_1B, False),
        _hf("hf_null", f"{old}: keys that are null", LLAMA_2_7B, True, num_key_value_heads=None, head_dim=None),
        _hf("hf_wide", f"{new}: head_dim that is not hidden_size / num_attention_heads", WIDE, False),
        _hf("hf_large_eps", f"{new}: an eps that is no program's default", replace(LLAMA_3_8B, norm_eps=3e-4), False),
        _meta("meta_llama_2", "params.json of Llama 2 7B: ffn_dim by its formula, no θ, vocab_size -1", LLAMA_2_7B,
            ("vocab_size",), multiple_of=256, vocab_size=-1),
        _meta("meta_llama_2_70b", "params.json of Llama 2 70B: ffn_dim_multiplier", LLAMA_2_70B, ("vocab_size",),
            multiple_of=4096, ffn_dim_multiplier=1.3, n_kv_heads=8, vocab_size=-1),
        _meta("meta_llama_3", "params.json of Llama 3 8B: θ", LLAMA_3_8B, multiple_of=1024, ffn_dim_multiplier=1.3, **grouped),
        _meta("meta_llama_3_1", "params.json of Llama 3.1 8B: use_scaled_rope means factor 8", LLAMA_3_1_8B,
            multiple_of=1024, ffn_dim_multiplier=1.3, use_scaled_rope=True, **grouped),
        _meta("meta_llama_3_2", "params.json of Llama 3.2 1B: use_scaled_rope, and the shape, mean factor 32", LLAMA_3_2_1B,
            multiple_of=256, ffn_dim_multiplier=1.5, use_scaled_rope=True, **grouped),
        _gguf("gguf_llama_2", "GGUF metadata: eps, θ and heads under their own keys", LLAMA_2_7B),
        _gguf("gguf_llama_3_1", "GGUF: the scaling is a tensor, rope_freqs.weight", LLAMA_3_1_8B),
        _gguf("gguf_llama_3_2", "GGUF: the scaling is a tensor; its largest divisor is 32", LLAMA_3_2_1B),
        _gguf("gguf_wide", "GGUF: head_dim is attention.key_length, not dim / n_heads", replace(WIDE, norm_eps=3e-4)),
    ]
    # fmt: on
    return {file.path: file for file in made}
