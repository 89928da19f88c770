"""Convert a checkpoint, and check what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint import open_model


def convert(src: Path, dst: Path, **options: object) -> list[str]:
    """Run `npllama convert`, and return its report."""
    from npllama_convert import sources  # on the machines of .ci/machines, where this is imported, nothing is installed

    lines: list[str] = []
    sources.convert(src, dst, report=lines.append, **options)
    return lines


def assert_same(folder: Path, params: Mapping[str, np.ndarray]) -> None:
    """Check that the model directory holds these parameters, bit for bit."""
    found = open_model(folder).params
    assert found.keys() == params.keys()
    for name, array in params.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name


def refused(src: Path, dst: Path, expected: str, **options: object) -> None:
    """Check that the conversion raises a ValueError of one line and leaves no files."""
    before = sorted(dst.parent.iterdir())
    with pytest.raises(ValueError, match=expected) as error:
        convert(src, dst, **options)
    assert "\n" not in str(error.value)
    assert sorted(dst.parent.iterdir()) == before
