"""Compute the table of docs/scale.md: what a model needs on several machines, and how fast it may decode.

    python -m benchmarks.scale             print the table
    python -m benchmarks.scale --write     put it into docs/scale.md

A token takes as long as one machine reads and widens its share of the weights, and as long as the sums take:

    seconds = weights of the largest share / rate  +  sums · steps · latency  +  bytes sent / bandwidth

The rate is measured on one machine, the network's figures are assumed. A sum of N machines takes ceil(log2 N) steps (recursive
doubling), and there are two in each layer.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from npllama import Config, parameter_shapes
from npllama.engine.ranks import shares

from .models import LLAMA_8B

# Llama 3.1
MODELS: dict[str, Config] = {
    "8B": LLAMA_8B,
    "70B": replace(LLAMA_8B, dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "405B": replace(LLAMA_8B, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
}
MACHINES = (1, 2, 4, 8, 16)
CORES = 2  # of each machine, one rank on each
# Packed weights that one rank multiplies by in a second, of bfloat16: one core of an Intel Xeon with AVX-512, NumPy 2.4.6.
RATE = 2.87e9
CONTEXT = 8192  # tokens in the cache, float32
# Gbit/s -> latency of a message in seconds: usual figures of TCP over Ethernet, and of InfiniBand
NETWORKS = {1: 50e-6, 10: 30e-6, 100: 5e-6}
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- python -m benchmarks.scale --write -->\n", "<!-- end -->\n"


def weights_of(config: Config, ranks: int) -> list[int]:
    """Return how many weights each rank multiplies by for a token; the embedding is looked up, not multiplied."""
    found = []
    for share in shares.shares(config, ranks):
        own = shares.own_config(config, share)
        names = {name: math.prod(shape) for name, shape in parameter_shapes(own).items() if name != "tok_embeddings.weight"}
        names["output.weight"] = shares.length(share.vocabulary) * config.dim
        found.append(sum(names.values()))
    return found


def memory_of(config: Config, machines: int) -> float:
    """Return the bytes that the fullest machine holds: bfloat16 weights of its ranks, one embedding, and their caches."""
    ranks = machines * CORES
    weights = weights_of(config, ranks)
    heads = [shares.length(share.kv_heads) for share in shares.shares(config, ranks)]
    embedding = config.vocab_size * config.dim
    per_head = 2 * config.n_layers * config.head_dim * CONTEXT * 4
    return max(
        2 * (sum(weights[i : i + CORES]) + embedding) + per_head * sum(heads[i : i + CORES]) for i in range(0, ranks, CORES)
    )


def sent_of(config: Config, machines: int) -> float:
    """Return the bytes that a machine sends for a token: its summands in every step of each sum, and its part of the logits."""
    steps = math.ceil(math.log2(machines))
    logits = 4 * config.vocab_size / machines * (machines - 1)
    return 2 * config.n_layers * steps * 4 * config.dim + (logits if machines > 1 else 0)


def tokens_per_second(config: Config, machines: int, gigabits: int) -> float:
    """Return the predicted speed of decoding one sequence."""
    steps, bandwidth = math.ceil(math.log2(machines)), gigabits * 1e9 / 8
    computing = max(weights_of(config, machines * CORES)) / RATE
    return 1 / (computing + 2 * config.n_layers * steps * NETWORKS[gigabits] + sent_of(config, machines) / bandwidth)


def table() -> str:
    """Return the table in Markdown."""
    speeds = " | ".join(f"tokens/s, {gigabits} Gbit/s" for gigabits in NETWORKS)
    lines = [
        f"| model | machines | memory of each, GB | sent per token, MB | {speeds} |",
        "|---|" + "---:|" * (3 + len(NETWORKS)),
    ]
    for name, config in MODELS.items():
        for machines in MACHINES:
            row = [
                f"{memory_of(config, machines) / 1e9:,.1f}",
                f"{sent_of(config, machines) / 1e6:.2f}" if machines > 1 else "0",
            ]
            row += [f"{tokens_per_second(config, machines, gigabits):.2f}" for gigabits in NETWORKS]
            lines.append(f"| {name} | {machines} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it into the document."""
    parser = argparse.ArgumentParser(description="compute the table of docs/scale.md")
    parser.add_argument("--write", action="store_true", help="put it into docs/scale.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
