"""npllama info: describe a model directory."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from .. import templates
from ..checkpoint import Model, demo_path, open_model, tensor_bytes
from ..config import n_parameters
from ..tokenizer import MissingPackage
from .options import Commands, add_command, stored_tensors


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "info", run, "describe a model directory: constants, storage, tokenizer, chat template")
    p.add_argument("model", nargs="?", metavar="MODEL", help="model directory or name (default: the embedded demo model)")


def run(args: argparse.Namespace) -> None:
    """Print a model's constants, storage, tokenizer, chat template and recommended settings."""
    model = open_model(demo_path() if args.model is None else args.model)
    config, tensors = model.config, stored_tensors(model)
    n_bytes = sum(map(tensor_bytes, tensors))
    print(f"{model.path}")
    n = n_parameters(config)
    print(f"{n:,} parameters in {len(tensors)} tensors, {n_bytes:,} bytes, {n_bytes * 8 / n:.2f} bits per weight")
    counts = Counter(map(_storage, tensors))
    print("stored as " + ", ".join(f"{storage} ({n} tensors)" for storage, n in sorted(counts.items())))
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {v}" for key, v in value.items())
        print(f"  {name:<16} {value}")
    try:
        tokenizer = model.tokenizer
        print(f"tokenizer: {f'{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids' if tokenizer else 'none'}")
    except MissingPackage as error:
        print(f"tokenizer: {error}")
    print(f"chat: {_chat(model)}")
    recommended = {key: value for key, value in model.generation.items() if value is not None and key != "chat_format"}
    print("recommended: " + (", ".join(f"{key} {value}" for key, value in recommended.items()) or "nothing"))


def _storage(tensor: dict[str, Any]) -> str:
    """Return a tensor's dtype or, if it is quantised, the bits and size of its groups."""
    if tensor["dtype"] != "grouped":
        return str(tensor["dtype"])
    return f"{tensor['grouping']['bits']} bits in groups of {tensor['grouping']['group']}"


def _chat(model: Model) -> str:
    """Return a description of the chat format that `npllama chat` uses."""
    assert model.path is not None
    names = list(templates.read_templates(model.path, model.manifest["files"]))
    format = model.generation.get("chat_format")
    if "default" in names:
        others = f" and {', '.join(names[1:])}" if len(names) > 1 else ""
        return f"its own template{others}" + (f", or {format} where jinja2 is missing" if format else "")
    return f"{format}, if it was trained for that" if format else "no template; npllama chat asks for --format"
