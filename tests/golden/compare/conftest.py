"""Make a reference and candidates for the tests of compare()."""

from __future__ import annotations

import json

import numpy as np
import pytest

from npllama.golden.precision import Precision
from npllama.golden.trace import write_trace

import broken_ports
from candidates import TOKENS


@pytest.fixture(scope="module")
def model():
    return broken_ports.tiny_model()


@pytest.fixture(scope="module")
def traces(model, tmp_path_factory):
    """Write a float64 reference, a float32 candidate and a raw one, of a prompt and a step."""
    folder = tmp_path_factory.mktemp("traces")
    write_trace(model, TOKENS, folder / "reference", 1, Precision("float64"))
    steps = json.loads((folder / "reference" / "trace.json").read_text())["steps"]
    write_trace(model, TOKENS, folder / "mine", steps)
    write_trace(model, TOKENS, folder / "raw", steps, storage="raw")
    return folder


@pytest.fixture
def arrays(traces):
    """Read the candidate's activations, for a test to change."""
    files = (traces / "mine").rglob("*.npy")
    return {file.relative_to(traces / "mine").as_posix()[:-4]: np.load(file) for file in files}
