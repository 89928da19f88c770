"""Every constant of a model, resolved and checked. None has a default: what a file leaves out, the converter decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from .errors import NpllamaError


class ConfigError(NpllamaError):
    """A model constant is missing, unknown, of the wrong type or impossible."""


def _check_fields(cls: type, values: Mapping[str, object]) -> None:
    names = [field.name for field in fields(cls)]
    if missing := [name for name in names if name not in values]:
        raise ConfigError(f"missing {', '.join(missing)}")
    if unknown := [name for name in values if name not in names]:
        raise ConfigError(f"unknown {', '.join(unknown)}")


def _check_positive(values: object, names: tuple[str, ...], kind: type) -> None:
    for name in names:
        value = getattr(values, name)
        numeric = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
        if not numeric or not 0 < value < math.inf:
            expected = "a positive whole number" if kind is int else "a positive number"
            raise ConfigError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later lower the RoPE frequencies, for texts longer than the context they were first trained on.

    Wavelengths shorter than original_max_seq_len / high_freq_factor stay, those longer than
    original_max_seq_len / low_freq_factor grow by `factor`, the ones between are interpolated (ops.rope_frequencies).
    Source: apply_scaling in llama-models 0.3.0, llama3/model.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        _check_positive(self, ("factor", "low_freq_factor", "high_freq_factor"), float)
        _check_positive(self, ("original_max_seq_len",), int)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LinearRopeScaling:
    """Every RoPE frequency divided by `factor`: the context stretched as if positions were closer together.

    Chen et al. 2023, arXiv:2306.15595 (position interpolation). Llama itself has none; some models made from Llama 2 do.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, ("factor",), float)


@dataclass(frozen=True)
class Config:
    """The constants of one Llama model, under the names of Meta's params.json where it has one.

    Raises ConfigError, a ValueError, when a value is impossible.
    """

    dim: int  # D, width of the residual stream
    n_layers: int
    n_heads: int  # H, query heads
    n_kv_heads: int  # G, key/value heads, shared by H / G query heads each
    head_dim: int  # K, even: RoPE rotates pairs
    ffn_dim: int  # F, inner width of the feed-forward
    vocab_size: int  # V
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | LinearRopeScaling | None
    max_seq_len: int  # context length in tokens
    tied_embeddings: bool  # the output matrix is the embedding

    def __post_init__(self) -> None:
        counts = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len")
        _check_positive(self, counts, int)
        _check_positive(self, ("norm_eps", "rope_theta"), float)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs")
        if not isinstance(self.tied_embeddings, bool):
            raise ConfigError(f"tied_embeddings is {self.tied_embeddings!r}, expected true or false")
        if not isinstance(self.rope_scaling, RopeScaling | LinearRopeScaling | None):
            raise ConfigError(f"rope_scaling is {self.rope_scaling!r}, expected a RopeScaling or nothing")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Config:
        """The inverse of to_dict; a missing or unknown key is a ConfigError that names it."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"found {type(values).__name__}, expected an object of model constants")
        _check_fields(cls, values)
        scaling = values["rope_scaling"]
        if scaling is not None:
            if not isinstance(scaling, Mapping):
                raise ConfigError(f"rope_scaling is {scaling!r}, expected an object or null")
            kind = LinearRopeScaling if set(scaling) == {"factor"} else RopeScaling
            _check_fields(kind, scaling)
            scaling = kind(**scaling)
        return cls(**{**values, "rope_scaling": scaling})

    def to_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return asdict(self)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every parameter, in Meta's names and the order of their use; linear weights are [out, in]."""
    D, F, V = config.dim, config.ffn_dim, config.vocab_size
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (D,),
        "attention.wq.weight": (q_dim, D),
        "attention.wk.weight": (kv_dim, D),
        "attention.wv.weight": (kv_dim, D),
        "attention.wo.weight": (D, q_dim),
        "ffn_norm.weight": (D,),
        "feed_forward.w1.weight": (F, D),
        "feed_forward.w2.weight": (D, F),
        "feed_forward.w3.weight": (F, D),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
    for i in range(config.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (D,)
    if not config.tied_embeddings:
        shapes["output.weight"] = (V, D)
    return shapes


def n_parameters(config: Config) -> int:
    """How many numbers the model has learned; a tied output matrix counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
