"""Write traces of broken_ports' model, and run `npllama compare` on them."""

from __future__ import annotations

import numpy as np

from npllama.cli import main

import broken_ports
import tiny

TOKENS = tiny.random_tokens(broken_ports.CONFIG, 2, 9)


def run(capsys, *args: object) -> tuple[int, str, str]:
    status = main(["compare", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def save_npz(folder, arrays):
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"
