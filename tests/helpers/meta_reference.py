"""Provide a torch Transformer with the structure of Meta's llama3/model.py, to test captures of it. Needs torch.

Ours is written in this file, operation by operation as in Meta's code. The real one is loaded from the path in the environment
variable NPLLAMA_META_MODEL (model.py of llama-models), with single-process stand-ins for fairscale, which it needs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from npllama import Config
from npllama.ops import rope_frequencies


class Norm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def apply_rotary_emb(xq, xk, freqs_cis):
    def turn(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis[None, :, None]).flatten(-2).type_as(x)

    return turn(xq), turn(xk)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.K = c.dim // c.n_heads
        self.wq = nn.Linear(c.dim, c.n_heads * self.K, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * self.K, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * self.K, bias=False)
        self.wo = nn.Linear(c.n_heads * self.K, c.dim, bias=False)
        self.cache = None

    def forward(self, x, start_pos, freqs_cis, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.K)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, k, freqs_cis=freqs_cis)
        if start_pos:
            k, v = torch.cat([self.cache[0], k], 1), torch.cat([self.cache[1], v], 1)
        self.cache = k, v
        k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], dim=2).transpose(1, 2) for z in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) / math.sqrt(self.K)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores.float(), dim=-1).type_as(q)
        return self.wo(torch.matmul(weights, v).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, c, ffn_dim):
        super().__init__()
        self.w1 = nn.Linear(c.dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c, ffn_dim):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c, ffn_dim)
        self.attention_norm, self.ffn_norm = Norm(c.dim, c.norm_eps), Norm(c.dim, c.norm_eps)

    def forward(self, x, start_pos, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, c, ffn_dim):
        super().__init__()
        self.params = c
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c, ffn_dim) for _ in range(c.n_layers))
        self.norm = Norm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        frequencies = torch.from_numpy(rope_frequencies(c.dim // c.n_heads, c.rope_theta, None, np.float32))
        angles = torch.outer(torch.arange(c.max_seq_len, dtype=torch.float32), frequencies)
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)

    @torch.inference_mode()
    def forward(self, tokens, start_pos):
        T = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        mask = None
        if T > 1:
            mask = torch.full((T, T), -math.inf).triu(1)
            mask = torch.hstack([torch.zeros(T, start_pos), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + T], mask)
        return self.output(self.norm(h)).float()


def real_transformer_class():
    """Return the Transformer of the real model.py, on stand-ins for fairscale's layers; None without NPLLAMA_META_MODEL."""
    path = os.environ.get("NPLLAMA_META_MODEL")
    if not path:
        return None

    def linear(n_in, n_out, **_options):
        return nn.Linear(n_in, n_out, bias=False)

    stubs = {name: ModuleType(name) for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel")}
    initialize = ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    layers = ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = linear
    layers.VocabParallelEmbedding = lambda n, dim, **_options: nn.Embedding(n, dim)
    package, args = ModuleType("meta_llama3"), ModuleType("meta_llama3.args")
    package.__path__, args.ModelArgs = [], SimpleNamespace
    stubs["fairscale.nn.model_parallel"].initialize = initialize
    stubs |= {module.__name__: module for module in (initialize, layers, package, args)}
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        spec = importlib.util.spec_from_file_location("meta_llama3.model", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module.Transformer


def meta_model(config: Config, params: dict[str, np.ndarray], dtype: str = "float32", real: bool = False) -> nn.Module:
    """Return Meta's Transformer, ours or the real one, with the parameters. head_dim must be dim / n_heads, ffn_dim 8/3 dim."""
    assert config.head_dim * config.n_heads == config.dim
    assert not config.tied_embeddings
    c = SimpleNamespace(**config.to_dict(), use_scaled_rope=config.rope_scaling is not None, max_batch_size=2)
    if real:
        c.multiple_of, c.ffn_dim_multiplier = 1, None
        assert int(8 * config.dim / 3) == config.ffn_dim
        model = real_transformer_class()(c)
    else:
        assert config.rope_scaling is None
        model = Transformer(c, config.ffn_dim)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in params.items()}
    model.load_state_dict(tensors)
    model = model.eval().to(getattr(torch, dtype))
    if real:
        model.params.max_seq_len = config.max_seq_len
    return model
