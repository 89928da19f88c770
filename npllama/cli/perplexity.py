"""npllama perplexity: measure how well a model predicts a text."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import load
from .console import rate, read_text
from .options import Commands, add_command, add_model_options, add_processes_option, load_model, required_tokenizer

if TYPE_CHECKING:
    from ..evaluate.perplexity import Comparison


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "perplexity", run, "measure how well a model predicts a text, by llama.cpp's method")
    p.add_argument("file", type=Path, metavar="FILE", help="text in UTF-8")
    p.add_argument("--context", type=int, default=512, metavar="N", help="tokens per window (default 512)")
    p.add_argument("--base", metavar="MODEL", help="also print the Kullback-Leibler divergence from this model")
    add_model_options(p)
    add_processes_option(p)


def run(args: argparse.Namespace) -> None:
    """Print the perplexity of a text; with --base, also the divergence between the two models."""
    from ..evaluate import perplexity

    text = read_text(args.file)
    model, base = load_model(args), load(args.base, args.dtype) if args.base is not None else None
    ids = required_tokenizer(model).encode(text, bos=True)
    if base is not None and required_tokenizer(base).encode(text, bos=True) != ids:
        raise ValueError(
            f"{model.path} and {base.path} tokenize {args.file} differently: expected models with the same tokenizer"
        )
    n = len(ids) // max(1, args.context) * args.context
    if not n and args.context > 0:
        raise ValueError(f"{args.file} has {len(ids):,} tokens, expected at least one window of {args.context:,} (--context)")
    started = time.perf_counter()
    comparison = None
    with progress_bar(n) as progress:
        if base is None:
            found = perplexity.perplexity(model, ids, args.context, progress)
        else:
            comparison = perplexity.compare(model, base, ids, args.context, progress)
            found = comparison.model
    seconds = time.perf_counter() - started
    print(f"perplexity          {found.value:.4f} +/- {found.error:.4f}")
    if comparison is not None:
        print_comparison(comparison)
    print(f"{len(found.nll):,} of {n:,} tokens scored at {rate(n, seconds)}", file=sys.stderr)


def print_comparison(comparison: Comparison) -> None:
    """Print the base's perplexity, the divergence from it with percentiles, and how often the likeliest tokens agree."""
    from ..evaluate.perplexity import Mean

    kl, same_top = Mean.of(comparison.kl), Mean.of(comparison.same_top)
    print(f"base perplexity     {comparison.base.value:.4f} +/- {comparison.base.error:.4f}")
    print(f"mean KL divergence  {kl.value:.6f} +/- {kl.error:.6f}")
    for percent in (1, 5, 10, 50, 90, 95, 99, 99.9, 100):
        print(f"{f'{percent} %':>18}  {np.percentile(comparison.kl, percent):.6f}")
    print(f"same top token      {100 * same_top.value:.3f} % +/- {100 * same_top.error:.3f} %")


@contextlib.contextmanager
def progress_bar(n_tokens: int) -> Iterator[Callable[[int], object] | None]:
    """Yield the update function of a progress bar, or None unless standard error is a terminal and tqdm is installed."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=n_tokens, unit=" tokens", unit_scale=True, leave=False) as bar:
        yield bar.update
