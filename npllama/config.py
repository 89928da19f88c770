"""Every constant of a model, resolved and checked. None has a default: what a file leaves out, the converter decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import NpllamaError, shown

MOST = 2**31 - 1  # of any count
# Within these no power, product or quotient of constants overflows in float32.
EPS_RANGE, FACTOR_RANGE = (1e-30, 1e3), (1e-12, 1e15)


class ConfigError(NpllamaError):
    """A model constant is missing, unknown, of the wrong type or impossible."""


def _check_fields(cls: type, values: Mapping[str, object]) -> None:
    names = [field.name for field in fields(cls)]
    if missing := [name for name in names if name not in values]:
        raise ConfigError(f"missing {', '.join(missing)}")
    if unknown := [name for name in values if name not in names]:
        raise ConfigError(f"unknown {', '.join(map(str, unknown[:5]))}")


def check_whole(name: str, value: object) -> int:
    """Return a positive whole number; ConfigError if the value is not one, or larger than MOST."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST:
        limit = f" up to {MOST}" if isinstance(value, int) and value > MOST else ""
        raise ConfigError(f"{name} is {shown(value)}, expected a positive whole number{limit}")
    return value


def check_number(name: str, value: object, limits: tuple[float, float]) -> float:
    """Return a positive number; ConfigError if the value is not one, or outside the limits."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not limits[0] <= number <= limits[1]:
        limit = f" from {limits[0]:g} to {limits[1]:g}" if 0 < number < math.inf else ""
        raise ConfigError(f"{name} is {shown(value)}, expected a positive number{limit}")
    return float(number)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's lowering of the RoPE frequencies, for texts longer than the context that the model was first trained on.

    Wavelengths shorter than original_max_seq_len / high_freq_factor stay, those longer than
    original_max_seq_len / low_freq_factor grow by `factor`, the ones between are interpolated (ops.rope_frequencies).
    Source: apply_scaling in llama-models 0.3.0, llama3/model.py.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_number(name, getattr(self, name), FACTOR_RANGE)
        check_whole("original_max_seq_len", self.original_max_seq_len)
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
        check_number("factor", self.factor, FACTOR_RANGE)


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
        for name in counts:
            check_whole(name, getattr(self, name))
        check_number("norm_eps", self.norm_eps, EPS_RANGE)
        check_number("rope_theta", self.rope_theta, FACTOR_RANGE)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs")
        if not isinstance(self.tied_embeddings, bool):
            raise ConfigError(f"tied_embeddings is {shown(self.tied_embeddings)}, expected true or false")
        if not isinstance(self.rope_scaling, RopeScaling | LinearRopeScaling | None):
            raise ConfigError(f"rope_scaling is {shown(self.rope_scaling)}, expected a RopeScaling or nothing")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Config:
        """Return the Config of to_dict()'s values; a missing or unknown key is a ConfigError that names it."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"found {type(values).__name__}, expected an object of model constants")
        _check_fields(cls, values)
        scaling = values["rope_scaling"]
        if scaling is not None:
            if not isinstance(scaling, Mapping):
                raise ConfigError(f"rope_scaling is {shown(scaling)}, expected an object or null")
            kind = LinearRopeScaling if set(scaling) == {"factor"} else RopeScaling
            _check_fields(kind, scaling)
            scaling = kind(**scaling)
        constants: dict[str, Any] = {**values, "rope_scaling": scaling}  # of any type: __post_init__ checks each
        return cls(**constants)

    def to_dict(self) -> dict[str, object]:
        """Return plain values, for JSON."""
        return asdict(self)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its name in Meta's files, in the order of use; linear weights are [out, in]."""
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
    """Return the number of parameters; a tied output matrix counts once."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())
