"""Run every path of linear.py, layout.py and fast.py on a real model: errors against float64, and the same greedy tokens."""

from __future__ import annotations

import numpy as np
import pytest

from npllama import KVCache, checkpoint, forward, generate, generate_batch, load
from npllama.engine import fast, threads
from npllama.engine.linear import widen

from tiny import relative_error

TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"
STORAGE = ["float32", "bfloat16", "float16", "int8"]


@pytest.fixture(scope="module", params=STORAGE)
def path(request, tmp_path_factory):
    """Return the embedded model in a storage dtype."""
    model, path = checkpoint.open_model(checkpoint.demo_path()), tmp_path_factory.mktemp("paths") / request.param
    auto = "float32" if request.param == "float32" else "bfloat16"
    dtypes = {name: request.param if request.param != "int8" or checkpoint.takes_int8(name) else auto for name in model.params}
    with checkpoint.create(path, model.config, dtypes, source={"kind": "test"}) as writer:
        for name, weight in model.params.items():
            writer.add(name, widen(weight) if request.param in ("float32", "float16", "int8") else weight)
    return path


@pytest.fixture(scope="module")
def tokens():
    return np.array(load().tokenizer.encode(TEXT, bos=True))


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def n_threads(request, monkeypatch, threads_restored):
    """Run on one thread and on two, which share this short text as if it were long."""
    if request.param == 2:
        monkeypatch.setattr(fast, "TOKENS", 8)
        monkeypatch.setattr(fast, "SHARED", 0)
        monkeypatch.setattr(fast, "TILE", 64)
    threads.set_threads(request.param)


@pytest.mark.parametrize("dtype", ["stored", "float32"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_the_error_against_float64(path, tokens, dtype, chunk, n_threads):
    """Compute row by row, a few at a time, and all at once."""
    exact_model = load(path, "float64")
    exact = forward(exact_model.params, exact_model.config, tokens)
    model = load(path, dtype)
    cache = KVCache(model.config)
    parts = [forward(model.params, model.config, tokens[i : i + chunk], cache) for i in range(0, len(tokens), chunk)]
    found = np.concatenate(parts)
    assert found.dtype == np.float32
    assert relative_error(found, exact) < 5e-6


def test_greedy_takes_the_same_tokens_on_every_path(path, tokens, n_threads):
    prompt = tokens.tolist()
    expected = list(generate(load(path, "float64"), prompt, max_tokens=40))
    for dtype in ("stored", "float32"):
        model = load(path, dtype)
        assert list(generate(model, prompt, max_tokens=40)) == expected
        assert list(generate(model, prompt, max_tokens=40, lookup=5)) == expected
        together = list(generate_batch(model, [prompt, prompt[:5], prompt], max_tokens=40))
        assert [row[0] for row in together] == [row[2] for row in together] == expected


@pytest.mark.parametrize("T", [40, 300])  # as tests force it, and as a long prompt goes
def test_padding_anywhere_is_attended_to_by_nothing(T, n_threads):
    """Pad before, between and after the tokens of a row: tiles leave out no slot that a query attends to."""
    model, rng = load(dtype="float32"), np.random.default_rng(5)
    rows = np.tile(rng.integers(0, model.config.vocab_size, T), (6, 1))
    ends, middle = np.arange(T) < T // 3, abs(np.arange(T) - T // 2) < T // 8
    last = np.arange(T) == T - 1
    for row, padding in zip(rows, (ends, ends[::-1], ends | last, middle, middle | last, rng.random(T) < 0.5), strict=True):
        row[padding] = -1
        alone = forward(model.params, model.config, row)
        kept = forward(model.params, model.config, row[~padding])
        assert relative_error(alone[~padding], kept) < 5e-6
    together = forward(model.params, model.config, rows)
    for row, found in zip(rows, together, strict=True):
        assert relative_error(found[row >= 0], forward(model.params, model.config, row[row >= 0])) < 5e-6


def test_who_watches_sees_every_token(n_threads):
    """Hand a tap whole activations, in the order of the formulas."""
    model, shapes = load(), {}
    tokens = np.arange(40)

    def tap(name: str, x: np.ndarray) -> np.ndarray:
        assert name not in shapes
        shapes[name] = x.shape
        return x

    forward(model.params, model.config, tokens, tap=tap)
    assert shapes["layers.0.out"] == shapes["layers.0.ffn_norm"] == (40, model.config.dim)
