"""npllama info: say what a model directory holds."""

from __future__ import annotations

import argparse

from ..checkpoint import demo_path, open_model
from ..config import n_parameters
from ..tokenizer import MissingPackage
from .options import Commands, add_command, stored_tensors


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "info", run, "say what a model directory holds")
    p.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded demo model")


def run(args: argparse.Namespace) -> None:
    """Print the constants of a model and what its files hold."""
    model = open_model(demo_path() if args.model is None else args.model)
    config, tensors = model.config, stored_tensors(model)
    n_bytes = sum(t["bytes"] + (t["scale"]["bytes"] if t["dtype"] == "int8" else 0) for t in tensors)
    print(f"{model.path}")
    print(f"{n_parameters(config):,} parameters in {len(tensors)} tensors, {n_bytes:,} bytes")
    counts = {dtype: sum(t["dtype"] == dtype for t in tensors) for dtype in sorted({t["dtype"] for t in tensors})}
    print("stored as " + ", ".join(f"{dtype} ({n} tensors)" for dtype, n in counts.items()))
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {v}" for key, v in value.items())
        print(f"  {name:<16} {value}")
    try:
        tokenizer = model.tokenizer
        print(f"tokenizer: {f'{type(tokenizer).__name__}, {tokenizer.vocab_size:,} ids' if tokenizer else 'none'}")
    except MissingPackage as error:
        print(f"tokenizer: {error}")
    recommended = {key: value for key, value in model.generation.items() if value is not None}
    print("recommended: " + (", ".join(f"{key} {value}" for key, value in recommended.items()) or "nothing"))
