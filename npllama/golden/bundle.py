"""Golden bundles: what a model must compute for some tokens, and how far rounding alone may take another implementation.

A bundle is a trace directory (trace.py) of a float64 pass, with the logits in float64 and the other activations rounded to
float32, and in each activation's entry its noise floor:

    "noise"  {"float32": {"rms": ..., "max": ...}, "bfloat16": {"rms": ..., "max": ...}}

They are the root mean square and the largest magnitude of the difference between npllama's own pass in that precision (bfloat16
is simulated in Meta's convention, precision.py) and the float64 pass. A README.md says how to use it from any language.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..activations import table_of
from ..checkpoint import Model
from ..config import Config, parameter_shapes
from ..engine.memory import size_text
from ..engine.ranks.passes import whole_params
from ..engine.weights import widen
from .precision import Precision
from .trace import (
    EVERYTHING,
    FLOAT32,
    Recording,
    Selection,
    Trace,
    checked_run,
    model_facts,
    n_steps_of,
    new_trace,
    read_trace,
    run,
    trace_size,
)

FLOAT64 = Precision("float64")
NOISE_OF = {"float32": FLOAT32, "bfloat16": Precision("bfloat16", "meta")}
NOTES = (
    "computed in float64; the logits are stored so, the other activations rounded to float32",
    "noise: the rms and the largest difference of npllama's pass in that precision from this one",
)


def write_golden(
    model: Model,
    tokens: ArrayLike,
    out: Path | str,
    steps: int | ArrayLike = 0,
    selection: Selection = EVERYTHING,
    force: bool = False,
    report: Callable[[str], object] = lambda line: None,
    weights: bool = False,
) -> Trace:
    """Write the golden bundle of a model for a prompt and decode steps; the arguments are those of trace.write_trace().

    It always contains the logits; `weights` adds the model's weights, widened to float32. Raises ValueError.
    """
    tokens, _ = checked_run(model.config, tokens, steps)
    whole = whole_params(model.params) if weights else {}
    selection.check(model.config)
    if "logits" not in selection:
        selection = Selection((*(selection.taps or ()), "logits"), selection.layers)
    n_activations, n_bytes = trace_size(model.config, tokens, n_steps_of(steps), FLOAT32, selection)
    n_logits = int(np.prod(tokens.shape[:-1])) * (tokens.shape[-1] + n_steps_of(steps)) * model.config.vocab_size
    n_bytes += 4 * n_logits  # these are float64
    shapes = parameter_shapes(model.config).values() if weights else ()
    n_bytes += sum(128 + 4 * int(np.prod(shape)) for shape in shapes)
    with new_trace(out, selection, "npy", force, n_bytes) as writer:
        report(f"{n_activations} activations, {size_text(n_bytes)}, to {out}")
        exact = Recording(selection)
        fed = run(model, tokens, steps, FLOAT64, exact)
        noise = {name: measure_noise(model, tokens, fed, precision, exact) for name, precision in NOISE_OF.items()}
        for name, x in exact.items():
            stored = x if name.endswith("logits") else x.astype(np.float32)
            writer.add(name, stored, noise={precision: found[name] for precision, found in noise.items()})
        for name, weight in whole.items():
            writer.add_weight(name, widen(weight))
        facts = model_facts(model) | {"path": None}  # on another machine the model's path means nothing
        writer.describe("npllama", tokens, fed, FLOAT64, facts, notes=NOTES)
        writer.add_text("README.md", _readme(tokens, fed, facts, model.config, weights))
    return read_trace(out)


def default_tokens(config: Config) -> list[int]:
    """Return twelve ids, the same on every machine, for a bundle that needs no tokenizer."""
    return np.random.RandomState(0).randint(config.vocab_size, size=12).tolist()


def measure_noise(
    model: Model, tokens: ArrayLike, steps: int | ArrayLike, precision: Precision, exact: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Measure how far a pass in a precision is from the exact activations: name -> {"rms", "max"} of the differences.

    An equal -inf (masked scores) is left out.
    """
    found = {}

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        if name in exact:
            kept = np.isfinite(exact[name])
            difference = x[kept] - exact[name][kept]
            found[name] = {"rms": float(np.sqrt(np.mean(difference**2))), "max": float(np.max(np.abs(difference)))}
        return x

    run(model, tokens, steps, precision, tap)
    return found


def _readme(tokens: np.ndarray, steps: list, facts: dict, config: Config, weights: bool) -> str:
    then = (
        f"\nThen, one at a time through the cache, the tokens {json.dumps(steps)}: the folders `step.0/`, `step.1/` ...,\n"
        "where T is 1 and S counts all tokens so far.\n"
    )
    table = [(row.full_name("N"), ", ".join(row.axes), row.formula, row.sentence) for row in table_of(config)]
    return README.format(
        tokens=json.dumps(tokens.tolist()),
        table="\n".join(f"| {name} | [{axes}] | {formula} | {sentence} |" for name, axes, formula, sentence in table),
        steps=then if steps else "",
        weights=WEIGHTS if weights else "",
        config="\n".join(f"    {key} = {json.dumps(value)}" for key, value in facts["config"].items()),
        manifest=f"The sha256 of its manifest.json is `{facts['manifest_sha256']}`.\n" if facts["manifest_sha256"] else "",
    )


WEIGHTS = """\
Its weights are in `weights/`, float32, under Meta's names: matrices [out, in] in C order, queries and keys in Meta's order.
"""
README = """\
# Golden activations

What a Llama model computes, operation by operation, for the tokens

    {tokens}
{steps}
The model:

{config}

{manifest}{weights}
Everything here was computed in float64 by npllama. `logits.npy` holds float64, all other files float32.

## The files

One activation a file, named after what it holds: `layers.0.attention.q_rope.npy` is layer 0's queries after RoPE.
Axes: T tokens, S all tokens so far (here T), D = dim, H = n_heads, G = n_kv_heads, K = head_dim, F = ffn_dim, V = vocab_size;
C order, little-endian.

In the formulas, x is the residual stream before attention and h before the feed-forward, y is RMSNorm of either, and
W1 is layers.N.feed_forward.w1. RoPE rotates the pairs (x[2j], x[2j+1]) of a head at position m by the angles m·θ_j.

| file | shape | formula | meaning |
|---|---|---|---|
{table}

If your queries and keys are in Hugging Face's order, (x[j], x[j + K/2]), reorder them first:
theirs[j] is ours[2j], theirs[j + K/2] is ours[2j+1].

A bundle may hold only some of these. `trace.json` lists its files, with each file's shape, dtype, sha256, minimum, maximum,
mean and rms.

## Reading a file

Python: `numpy.load(path)`. Elsewhere: an `.npy` file is a header, then the bare numbers. The header's length is 10 plus the
16-bit little-endian number at byte 8, which is 128 for every file here:

    float *x = malloc(n * sizeof *x);
    FILE *f = fopen("layers.0.attention.q_rope.npy", "rb");
    fseek(f, 128, SEEK_SET);
    fread(x, sizeof *x, n, f);

## Judging your numbers

Not by equality: two correct programs differ by rounding. Each entry of `trace.json` has `noise`, the rms and the largest
difference that npllama's own float32 (or simulated bfloat16) pass has from these numbers. For each activation, in the order of
`trace.json`, take the rms of yours minus ours over the finite elements and divide it by `noise.float32.rms` (or
`noise.bfloat16.rms`, if you compute in that); where that is 0, as for the embedding, take a few units in the last place:

- about 1: rounding, your operation is right
- 10 or more: an error; the first such activation is where your program goes wrong, and those before it are right

Or let npllama do it: write yours as `.npy` files or raw float32 and run `npllama compare THIS_FOLDER YOURS`.
"""
