"""Measure each storage dtype of a model: bytes, perplexity, decoding speed of the stored weights.

By itself: python -m benchmarks.storage MODEL_SOURCE TEXT [--share 0.1]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import npllama
from npllama import checkpoint
from npllama.cli.console import FORESEEN, error_text, read_text, say_error
from npllama.evaluate.perplexity import perplexity
from npllama.generation import prefill
from npllama_convert import sources
from npllama_convert.conversion import Source, Tensor, write

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
CONTEXT = 512
PROMPT = 16  # tokens before a decode


def open_source(path: str | Path) -> Source:
    """Open a source of `npllama convert`, or a model directory."""
    if not (Path(path) / "manifest.json").is_file():
        return sources.read(path)
    model = checkpoint.open_model(path)
    tensors = {name: Tensor.of(array) for name, array in model.params.items()}
    tokenizer = {name: model.path / name for name in model.manifest["files"] if name.startswith("tokenizer")}
    return Source("npllama", model.config, tensors, [], tokenizer)


def decode_rate(model: npllama.Model, n: int) -> float:
    """Return the tokens per second, the prompt not counted."""
    ids, cache = np.arange(PROMPT + n) % model.config.vocab_size, npllama.KVCache(model.config)
    prefill(model, ids[:PROMPT], cache)
    started = time.perf_counter()
    for id in ids[PROMPT:]:
        npllama.forward(model.params, model.config, [id], cache, last_only=True)
    return n / (time.perf_counter() - started)


def progress(line: str) -> None:
    """Print on standard error what is being measured."""
    print(f"storage: {line}", file=sys.stderr, flush=True)


def measure(name: str, source: Source, ids: list[int], n_decode: int, rounds: int) -> dict[str, object]:
    """Return a row of figures for each dtype; decoding is measured alternately, the median counts."""
    context = min(CONTEXT, source.config.max_seq_len)
    result: dict[str, object] = {"model": name, "context": context, "windows": len(ids) // context, "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="npllama-storage-") as folder:
        models = {}
        for dtype in DTYPES:
            progress(f"{name}: writing it as {dtype}")
            write(source, Path(folder) / dtype, dtype, report=lambda line: None)
            models[dtype] = npllama.load(Path(folder) / dtype, "stored")
        progress(f"{name}: decoding, {rounds} rounds")
        rates = [{dtype: decode_rate(model, n_decode) for dtype, model in models.items()} for _ in range(rounds)]
        for dtype, model in models.items():
            progress(f"{name}: perplexity of {dtype}")
            found = perplexity(model, ids, context)
            result[dtype] = {
                "bytes": sum(weight.nbytes for weight in checkpoint.open_model(model.path).params.values()),
                "perplexity": found.value,
                "perplexity_error": found.error,
                "decode_tokens_per_second": statistics.median(rate[dtype] for rate in rates),
            }
    return result


def show(result: dict[str, object]) -> None:
    """Print the figures as the table of docs/running.md."""
    print(f"\n{result['model']}: storage; perplexity on {result['windows']} windows of {result['context']} tokens")
    print("| `--dtype` | MB | perplexity | to float32 | decode, tokens/s |")
    print("|---|---|---|---|---|")
    for dtype in DTYPES:
        row = result[dtype]
        change = 100 * (row["perplexity"] / result["float32"]["perplexity"] - 1)
        print(
            f"| {dtype} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.3f} | {change:+.3f} % "
            f"| {row['decode_tokens_per_second']:.1f} |"
        )


def run_on(path: str | Path, text: str, share: float) -> dict[str, object]:
    """Measure a model on the last part of a text. Raises ValueError before anything is converted."""
    if not 0 < share <= 1:
        raise ValueError(f"--share is {share}, expected more than 0 and at most 1")
    source = open_source(path)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in source.tokenizer.items():
            (Path(folder) / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        names = [name for name in checkpoint.TOKENIZER_FILES if name in source.tokenizer]
        if not names:
            raise ValueError(f"{path} has no tokenizer")
        ids = npllama.load_tokenizer(Path(folder) / names[0]).encode(text[-math.ceil(share * len(text)) :])
    if len(ids) < (context := min(CONTEXT, source.config.max_seq_len)):
        raise ValueError(f"--share {share:g} of the text has {len(ids):,} tokens, expected at least one window of {context:,}")
    result = measure(Path(path).name, source, ids, n_decode=32, rounds=5)
    show(result)
    return result


def run(quick: bool = False) -> list[dict[str, object]]:
    """Measure the embedded model on its own samples, which needs no file; and SmolLM2 on Shakespeare, where both are given."""
    model = npllama.load(dtype="float32")
    n = min(CONTEXT, model.config.max_seq_len)
    prompts = [[model.tokenizer.bos_id]] * (2 if quick else 16)
    steps = npllama.generate_batch(model, prompts, n - 1, npllama.Sampling(temperature=1.0), stop_ids=[])
    ids = [id for prompt, said in zip(prompts, zip(*steps, strict=True), strict=True) for id in (*prompt, *said)]
    source = open_source(checkpoint.demo_path())
    results = [measure("embedded model, on its own samples", source, ids, n_decode=32, rounds=3 if quick else 5)]
    show(results[0])
    gguf, data = os.environ.get("NPLLAMA_SMOLLM2_GGUF"), os.environ.get("NPLLAMA_SHARED_DATA")
    if not quick and gguf and data:
        results.append(run_on(gguf, (Path(data) / "tinyshakespeare.txt").read_text(encoding="utf-8"), share=0.1))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one model and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL_SOURCE", help="what npllama convert takes, or a model directory")
    parser.add_argument("text", type=Path, metavar="TEXT", help="a file in UTF-8")
    parser.add_argument("--share", type=float, default=0.1, metavar="X", help="measure on this last part of it (default 0.1)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(run_on(args.source, read_text(args.text), args.share)))
    except FORESEEN as error:
        say_error(f"benchmarks.storage: {error_text(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
