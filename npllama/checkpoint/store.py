"""The folder of fetched models, in which `-m smollm2-135m` finds a model by its name.

NPLLAMA_HOME, or the user's cache folder as platformdirs finds it, holds models/NAME, each a model directory.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from .atomic import survivor

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def home() -> Path:
    """Return the folder in which npllama keeps this user's models; it may not exist. Raises ValueError if none is known."""
    if chosen := os.environ.get("NPLLAMA_HOME"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            raise ValueError(f"NPLLAMA_HOME is {chosen!r}: there is no such user's home, expected a folder") from None
    try:
        return importlib.import_module("platformdirs").user_cache_path("npllama", appauthor=False)
    except ImportError:
        raise ValueError(
            "no folder for models is known: set NPLLAMA_HOME to one, or pip install platformdirs for your system's own "
            "('npllama[convert]' brings it)"
        ) from None


def folder(name: str) -> Path:
    """Return the model directory of a name, which may not exist. Raises ValueError if home() does."""
    return home() / "models" / name


def names() -> list[str]:
    """Return the names of the models in the store."""
    models = home() / "models"
    return sorted(path.name for path in models.iterdir() if NAME.fullmatch(path.name)) if models.is_dir() else []


def locate(model: str | Path) -> Path:
    """Return the path that `-m` refers to: an existing file or folder, else a model in the store by its name, else itself.

    Raises ValueError for a bare name that is neither, if no folder for models is known.
    """
    if not str(model):
        raise ValueError("the model's name is empty, expected a model directory or a name")
    path = Path(model)
    if os.path.lexists(path) or not NAME.fullmatch(str(model)):
        return path
    try:
        found = survivor(folder(str(model)))
    except ValueError as error:
        raise ValueError(f"{model}: there is no such folder, and as a name it can't be looked up: {error}") from None
    return found if found.exists() else path
