"""Cases compared with torch, live (test_torch.py) and recorded (test_goldens.py), with the bound of each comparison.

The bounds are relative errors: the largest difference over the reference's largest magnitude. They are ten times the
measured errors where that is tighter than the project's own limits (float32: 2e-6 an operation, 1e-5 the logits; float64:
1e-12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npllama import Config, KVCache, forward, ops
from npllama.engine import linear

from tiny import CONFIGS, LLAMA_3_1, LLAMA_3_2, random_tokens, uniform

DTYPES = ("float32", "float64")
OP_BOUND = {"float32": 1.6e-6, "float64": 2.6e-15}
LOGITS_BOUND = {"float32": 1e-5, "float64": 3e-14}

ROPE_SHAPES = {  # name -> head_dim, theta, scaling
    "llama2": (128, 10000.0, None),
    "llama3": (128, 500000.0, None),
    "llama3.1": (128, 500000.0, LLAMA_3_1),
    "llama3.2-1b": (64, 500000.0, LLAMA_3_2),
    "llama3.2-3b": (128, 500000.0, LLAMA_3_2),
    "smollm2-135m": (64, 100000.0, None),
    "mistral-7b": (128, 1000000.0, None),
    "stories": (8, 10000.0, None),
}


def op_inputs(dtype: str) -> dict[str, dict[str, np.ndarray]]:
    """Return operation -> its named inputs. RoPE's frequencies are an input, so that both sides rotate by the same angles."""
    T, S, H, G, K, D, F = 7, 7, 6, 2, 16, 96, 253
    x = [uniform(seed, (T, D)).astype(dtype) for seed in range(3)]
    frequencies = ops.rope_frequencies(K, 500000.0, LLAMA_3_1, dtype)
    return {
        "embed": {"tokens": np.array([[0, 5], [7, 5]]), "weight": uniform(20, (11, D)).astype(dtype)},
        "linear": {"x": x[0], "weight": uniform(21, (F, D)).astype(dtype)},
        "rms_norm": {"x": x[1], "weight": uniform(22, (D,)).astype(dtype), "eps": np.array(1e-5)},
        "rms_norm_small": {
            "x": x[1] * np.asarray(1e-3, dtype),
            "weight": uniform(22, (D,)).astype(dtype),
            "eps": np.array(1e-5),
        },
        "softmax": {"x": 10 * uniform(23, (H, T, S)).astype(dtype)},
        "silu": {"x": 10 * uniform(24, (T, F)).astype(dtype)},
        "swiglu": {"gate": uniform(25, (T, F)).astype(dtype), "up": uniform(26, (T, F)).astype(dtype)},
        "rope": {
            "x": uniform(27, (T, H, K)).astype(dtype),
            "positions": np.array([0, 1, 2, 100, 8191, 8192, 16000]),
            "frequencies": frequencies,
        },
        "attention": {
            "q": uniform(28, (2, T, H, K)).astype(dtype),
            "k": uniform(29, (2, T, G, K)).astype(dtype),
            "v": uniform(30, (2, T, G, K)).astype(dtype),
        },
    }


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    keys, values = k.swapaxes(-2, -3), v.swapaxes(-2, -3)
    positions = np.arange(q.shape[-3])
    weights = ops.softmax(ops.attention_scores(q, keys, ops.causal_mask(positions, positions, q.dtype)))
    return ops.attention_heads(weights, values)


OPS: dict[str, Callable[..., np.ndarray]] = {
    "embed": linear.embed,
    "linear": linear.linear,
    "rms_norm": lambda x, weight, eps: ops.rms_norm(x, weight, float(eps)),
    "rms_norm_small": lambda x, weight, eps: ops.rms_norm(x, weight, float(eps)),
    "softmax": ops.softmax,
    "silu": ops.silu,
    "swiglu": ops.swiglu,
    "rope": lambda x, positions, frequencies: ops.rope(x, *ops.rope_rotation(positions, frequencies)),
    "attention": attention,
}


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A tiny model with its tokens; only the last `n_compared` positions are compared with the reference."""

    config: Config
    seed: int
    shape: tuple[int, ...]
    n_compared: int

    @property
    def tokens(self) -> np.ndarray:
        return random_tokens(self.config, self.seed, self.shape)

    @property
    def long(self) -> bool:
        return self.shape[-1] > 1000

    def logits(self, params: dict[str, np.ndarray]) -> np.ndarray:
        """Compute npllama's logits; long prompts in chunks, which is the same computation."""
        chunk = 256
        tokens, cache = self.tokens, KVCache(self.config, self.shape[:-1])
        starts = range(0, tokens.shape[-1], chunk)
        logits = [forward(params, self.config, tokens[..., i : i + chunk], cache) for i in starts]
        return np.concatenate(logits, axis=-2)[..., -self.n_compared :, :]


def _model_cases() -> dict[str, ModelCase]:
    cases = {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        cases[name] = ModelCase(config, 100 + i, (40,), 40)
    cases["grouped-one-token"] = ModelCase(CONFIGS["grouped"], 200, (1,), 1)
    cases["grouped-batch"] = ModelCase(CONFIGS["grouped"], 201, (3, 17), 17)
    # Past the 8192 positions that the scaling starts from; one layer of three heads, since 8,400² scores take a while.
    small = {"n_layers": 1, "n_heads": 3, "n_kv_heads": 1}
    for name in ("llama3.1", "llama3.2"):
        cases[f"{name}-past-8192"] = ModelCase(dataclasses.replace(CONFIGS[name], **small), 300, (8400,), 16)
    return cases


MODEL_CASES = _model_cases()


def golden(name: str) -> dict[str, np.ndarray]:
    """Read the arrays of tests/goldens/NAME.npz."""
    with np.load(Path(__file__).parent.parent / "goldens" / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)
