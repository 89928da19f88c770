"""Make matrices quantised in groups, and models of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from npllama import checkpoint
from npllama.checkpoint import takes_int8
from npllama.engine.grouped import INT4, Grouped, Grouping
from npllama.engine.weights import to_bfloat16, widen

import tiny
from tiny import uniform

CONFIG = tiny.config(n_layers=1, ffn_dim=192)


def random_grouped(grouping: Grouping, shape: tuple[int, int], seed: int = 0) -> tuple[Grouped, np.ndarray]:
    """Return random quantised numbers and scales, and the float64 weights that they represent by definition."""
    random = np.random.RandomState(seed)
    n_out, levels, n_groups = shape[0], 1 + grouping.offset, shape[1] // grouping.group
    q = (
        random.randint(0, 16, shape).astype(np.uint8)
        if grouping.bits == 4
        else random.randint(-128, 128, shape).astype(np.int8)
    )
    of_unit = unit = None
    if grouping.unit:
        scale = random.randint(-32 if grouping.scale == "int8" else 0, 32, (levels, n_out, n_groups)).astype(grouping.scale)
        unit = uniform(seed + 1, (levels, n_out, n_groups // grouping.unit), std=0.01).astype(np.float16)
        of_unit = np.repeat(unit.astype(np.float64), grouping.unit, axis=-1)
        numbers = scale * of_unit
    else:
        scale = uniform(seed + 1, (levels, n_out, n_groups), std=0.1)
        scale = to_bfloat16(scale) if grouping.scale == "bfloat16" else scale.astype(grouping.scale)
        numbers = widen(scale).astype(np.float64) if grouping.scale == "bfloat16" else scale.astype(np.float64)
    exact = np.empty(shape)
    for g in range(n_groups):
        columns = slice(g * grouping.group, (g + 1) * grouping.group)
        exact[:, columns] = numbers[0, :, g, None] * (q[:, columns].astype(int) - grouping.zero)
        if grouping.offset:
            exact[:, columns] += numbers[1, :, g, None]
    return Grouped.of(grouping, q, scale, unit), exact


def write(path: Path, grouping: Grouping = INT4, config=CONFIG, **changes) -> dict[str, Grouped | np.ndarray]:
    """Return a model whose matrices are quantised, the embedding row by row."""
    rows_first = Grouping(8, 32, "float16", rows_first=True)
    params = dict(tiny.random_params(config, seed=1))
    kinds = {name: "float32" if params[name].ndim == 1 else grouping if takes_int8(name) else rows_first for name in params}
    for i, (name, kind) in enumerate(kinds.items()):
        if isinstance(kind, Grouping):
            params[name] = changes.get(name) or random_grouped(kind, params[name].shape, seed=i)[0]
    with checkpoint.create(path, config, kinds, {"kind": "test"}) as writer:
        for name, weight in params.items():
            if isinstance(weight, Grouped):  # in blocks of 50 rows
                writer.add_blocks(name, (weight.rows(slice(i, i + 50)) for i in range(0, weight.shape[0], 50)))
            else:
                writer.add(name, weight)
    return params
