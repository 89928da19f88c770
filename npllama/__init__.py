"""Llama in pure NumPy: a reference implementation to check others against.

Names are imported when they are first used: `import npllama` is fast, and the command line can prepare for Ctrl-C before the
slow imports.
"""

import importlib

TYPE_CHECKING = False  # type checkers take it for typing's, whose import would be the longest part of this file's
if TYPE_CHECKING:
    from .cache import KVCache
    from .checkpoint import CheckpointError, Model, load, verify
    from .config import Config, ConfigError, LinearRopeScaling, RopeScaling, n_parameters, parameter_shapes
    from .errors import NpllamaError
    from .generation import Step, generate, generate_batch, generate_steps
    from .golden.bundle import write_golden
    from .golden.precision import Precision
    from .golden.trace import Recording, Selection, Trace, TraceError, read_trace, record, write_trace
    from .model import forward, no_tap
    from .sampling import Sampling
    from .text.completion import Completion, Stream, TokenLogprobs, complete
    from .text.conversation import Conversation, ConversationError
    from .tokenizer import Tokenizer, load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Completion",
    "Config",
    "ConfigError",
    "Conversation",
    "ConversationError",
    "KVCache",
    "LinearRopeScaling",
    "Model",
    "NpllamaError",
    "Precision",
    "Recording",
    "RopeScaling",
    "Sampling",
    "Selection",
    "Step",
    "Stream",
    "TokenLogprobs",
    "Tokenizer",
    "Trace",
    "TraceError",
    "complete",
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

_MODULES = {
    "cache": ["KVCache"],
    "checkpoint": ["CheckpointError", "Model", "load", "verify"],
    "config": ["Config", "ConfigError", "LinearRopeScaling", "RopeScaling", "n_parameters", "parameter_shapes"],
    "errors": ["NpllamaError"],
    "generation": ["Step", "generate", "generate_batch", "generate_steps"],
    "golden.bundle": ["write_golden"],
    "golden.precision": ["Precision"],
    "golden.trace": ["Recording", "Selection", "Trace", "TraceError", "read_trace", "record", "write_trace"],
    "model": ["forward", "no_tap"],
    "sampling": ["Sampling"],
    "text.completion": ["Completion", "Stream", "TokenLogprobs", "complete"],
    "text.conversation": ["Conversation", "ConversationError"],
    "tokenizer": ["Tokenizer", "load_tokenizer"],
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = found = getattr(importlib.import_module(f".{module}", __name__), name)
            return found
    if not name.startswith("_"):
        try:
            return importlib.import_module(f".{name}", __name__)  # npllama.ops, without an import of its own
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
