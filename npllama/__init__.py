"""Llama in pure NumPy: the reference implementation that others check themselves against."""

import importlib
import logging
from typing import TYPE_CHECKING

from .cache import KVCache
from .checkpoint import CheckpointError, Model, load, verify
from .config import Config, ConfigError, LinearRopeScaling, RopeScaling, n_parameters, parameter_shapes
from .generation import Step, generate, generate_batch, generate_steps
from .model import forward, no_tap
from .sampling import Sampling
from .tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .golden import write_golden
    from .precision import Precision
    from .trace import Recording, Selection, Trace, TraceError, read_trace, record, write_trace

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who wants to read it says so

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "KVCache",
    "LinearRopeScaling",
    "Model",
    "Precision",
    "Recording",
    "RopeScaling",
    "Sampling",
    "Selection",
    "Step",
    "Tokenizer",
    "Trace",
    "TraceError",
    "forward",
    "generate",
    "generate_batch",
    "generate_steps",
    "load",
    "load_tokenizer",
    "n_parameters",
    "no_tap",
    "parameter_shapes",
    "read_trace",
    "record",
    "verify",
    "write_golden",
    "write_trace",
]

# Loaded when first asked for: `import npllama` stays quick for those who only run a model.
_LATER = {
    "precision": ["Precision"],
    "trace": ["Recording", "Selection", "Trace", "TraceError", "read_trace", "record", "write_trace"],
    "golden": ["write_golden"],
}


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
