"""The adapters of docs/cs336.md against torch's functions, on the inputs and at the tolerances of Stanford's assignment."""

from __future__ import annotations

import re

import numpy as np
import pytest

from system import ROOT

pytestmark = pytest.mark.torch
BATCH, QUERIES, KEYS, HEADS, HEAD, FFN, THETA = 4, 12, 16, 4, 16, 128, 10000.0
WIDTH = HEADS * HEAD


@pytest.fixture(scope="module")
def adapters():
    """Return the functions of the page."""
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "cs336.md").read_text(encoding="utf-8"), re.M | re.S)
    names: dict = {}
    exec(compile(code, "cs336.md", "exec"), names)
    return names


def draw(seed, *shape):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def agrees(ours, theirs, atol=1e-6, rtol=1e-4):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=rtol, atol=atol)


def rotated(x, positions):
    """Compute RoPE as complex multiplication.    x [..., T, K], positions [T]"""
    import torch

    frequencies = THETA ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(positions.float(), frequencies)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def self_attention(x, q, k, v, o, positions=None):
    from torch.nn import functional as F

    q, k, v = (F.linear(x, w).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for w in (q, k, v))
    if positions is not None:
        q, k = rotated(q, positions), rotated(k, positions)
    return F.linear(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), o)


@pytest.mark.parametrize("heads", [None, 2])
def test_attention(heads, adapters):
    from torch.nn import functional as F

    q, k, v = draw(1, BATCH, QUERIES, WIDTH), draw(2, BATCH, KEYS, WIDTH), draw(3, BATCH, KEYS, WIDTH)
    mask = draw(5, BATCH, QUERIES, KEYS) > 0.5
    if heads:
        q, k, v, mask = (x.unflatten(0, (-1, heads)) for x in (q, k, v, mask))
    assert mask.any(-1).all(), "a query without any key has no softmax"
    ours = adapters["run_scaled_dot_product_attention"](*(x.numpy() for x in (q, k, v, mask)))
    agrees(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_rope(adapters):
    import torch

    x, positions = draw(4, BATCH, QUERIES, WIDTH), torch.arange(QUERIES)
    agrees(adapters["run_rope"](WIDTH, THETA, QUERIES, x.numpy(), positions.numpy()), rotated(x, positions))


def test_single_operations(adapters):
    import torch
    from torch.nn import functional as F

    x, weight = draw(4, BATCH, QUERIES, WIDTH), draw(7, WIDTH)
    agrees(adapters["run_silu"](x.numpy()), F.silu(x))
    agrees(adapters["run_softmax"](x.numpy(), 1), F.softmax(x, 1))
    agrees(adapters["run_rmsnorm"](WIDTH, 1e-5, weight.numpy(), x.numpy()), F.rms_norm(x, (WIDTH,), weight, 1e-5))
    w1, w2, w3 = draw(8, FFN, WIDTH) / 8, draw(9, WIDTH, FFN) / 8, draw(10, FFN, WIDTH) / 8
    agrees(adapters["run_linear"](WIDTH, FFN, w1.numpy(), x.numpy()), F.linear(x, w1))
    swiglu = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    agrees(adapters["run_swiglu"](WIDTH, FFN, w1.numpy(), w2.numpy(), w3.numpy(), x.numpy()), swiglu, atol=1e-5)
    ids = torch.arange(QUERIES)
    agrees(adapters["run_embedding"](FFN, WIDTH, w1.numpy(), ids.numpy()), F.embedding(ids, w1))


def test_self_attention(adapters):
    import torch

    x, positions = draw(4, BATCH, QUERIES, WIDTH), torch.arange(QUERIES)
    weights = [draw(20 + i, WIDTH, WIDTH) / 8 for i in range(4)]
    given = [w.numpy() for w in weights]
    agrees(adapters["run_multihead_self_attention"](WIDTH, HEADS, *given, x.numpy()), self_attention(x, *weights))
    ours = adapters["run_multihead_self_attention_with_rope"](
        WIDTH, HEADS, QUERIES, THETA, *given, x.numpy(), positions.numpy()
    )
    agrees(ours, self_attention(x, *weights, positions))


def test_a_whole_model(adapters):
    import torch
    from torch.nn import functional as F

    vocabulary, layers = 100, 3
    weights = {"token_embeddings.weight": draw(30, vocabulary, WIDTH), "lm_head.weight": draw(31, vocabulary, WIDTH) / 8}
    weights["ln_final.weight"] = draw(32, WIDTH)
    for i in range(layers):
        for j, name in enumerate(("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj")):
            weights[f"layers.{i}.{name}.weight"] = draw(40 + 20 * i + j, WIDTH, WIDTH) / 8
        for j, (name, shape) in enumerate(
            {"ffn.w1": (FFN, WIDTH), "ffn.w2": (WIDTH, FFN), "ffn.w3": (FFN, WIDTH), "ln1": (WIDTH,), "ln2": (WIDTH,)}.items()
        ):
            weights[f"layers.{i}.{name}.weight"] = draw(50 + 20 * i + j, *shape) / (8 if len(shape) > 1 else 1)
    ids = torch.randint(0, vocabulary, (BATCH, QUERIES), generator=torch.Generator().manual_seed(6))

    def normed(x, name):
        return F.rms_norm(x, (WIDTH,), weights[name], 1e-5)

    x, positions = F.embedding(ids, weights["token_embeddings.weight"]), torch.arange(QUERIES)
    for i in range(layers):
        block = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items()}
        projections = (block[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output"))
        x = x + self_attention(normed(x, f"layers.{i}.ln1.weight"), *projections, positions)
        h = normed(x, f"layers.{i}.ln2.weight")
        gated = F.silu(F.linear(h, block["ffn.w1.weight"])) * F.linear(h, block["ffn.w3.weight"])
        x = x + F.linear(gated, block["ffn.w2.weight"])
    expected = F.linear(normed(x, "ln_final.weight"), weights["lm_head.weight"])
    arrays = {name: w.numpy() for name, w in weights.items()}
    ours = adapters["run_transformer_lm"](vocabulary, KEYS, WIDTH, layers, HEADS, FFN, THETA, arrays, ids.numpy())
    agrees(ours, expected, atol=1e-4, rtol=1e-2)
