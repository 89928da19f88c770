"""Record torch's numbers for the tests that run where torch is absent:  python tests/make_goldens.py

Writes tests/goldens/*.npz: the operations, the RoPE frequencies, the logits and layer outputs of the tiny models, and the
answers of the embedded model. Each file's `about` holds the versions and seeds. Needs the extras test and torch.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

import npllama
from npllama.ops import rope_frequencies

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
import cases
import hf_reference as hf
import tiny

GOLDENS = Path(__file__).parent / "goldens"
PARAMS_SEED = 1


def about(**facts) -> str:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return json.dumps({"made_by": "tests/make_goldens.py", "python": platform.python_version(), **versions, **facts})


def make_ops() -> None:
    arrays = {}
    for dtype in cases.DTYPES:
        for name, inputs in cases.op_inputs(dtype).items():
            arrays |= {f"{dtype}/{name}/{key}": value for key, value in inputs.items()}
            arrays[f"{dtype}/{name}/output"] = hf.torch_op(name, inputs)
    np.savez_compressed(GOLDENS / "ops.npz", about=about(seeds="in tests/helpers/cases.py, op_inputs"), **arrays)


def make_frequencies() -> None:
    arrays = {name: hf.torch_frequencies(shape) for name, shape in cases.ROPE_SHAPES.items()}
    np.savez_compressed(GOLDENS / "frequencies.npz", about=about(source="transformers LlamaRotaryEmbedding.inv_freq"), **arrays)


def make_model(name: str, case: cases.ModelCase) -> None:
    params = tiny.random_params(case.config, PARAMS_SEED)
    params64 = {key: x.astype(np.float64) for key, x in params.items()}
    # Far out, one unit in the last place of a frequency shows: there both sides are given the same ones.
    config = case.config
    ours = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, "float32") if case.long else None
    judge = {
        "float32": hf.hf_model(config, params, frequencies=ours),
        "float64": hf.hf_model(config, params64, "float64"),
    }
    arrays: dict[str, np.ndarray] = {"tokens": case.tokens}
    for dtype, model in judge.items():
        arrays[f"{dtype}/logits"] = hf.hf_logits(model, case.tokens)[..., -case.n_compared :, :]
        if case.tokens.ndim == 1 and not case.long:
            for i, x in enumerate(hf.hf_layer_outputs(model, case.tokens)):
                arrays[f"{dtype}/layers.{i}.out"] = x
    facts = about(params_seed=PARAMS_SEED, tokens_seed=case.seed, params_sha256=tiny.sha256_of(params))
    np.savez_compressed(GOLDENS / f"model-{name}.npz", about=facts, **arrays)


DEMO_PROMPT = "ROMEO:\nBut, soft! what light through yonder window breaks?\n"


def make_demo() -> None:
    """Record the embedded model: logits of a prompt, and the greedy continuation of it by Hugging Face's own generate()."""
    model = npllama.load(dtype="float32")
    tokens = np.array(model.tokenizer.encode(DEMO_PROMPT, bos=True))
    judge = hf.hf_model(model.config, model.params)
    params64 = {key: x.astype(np.float64) for key, x in model.params.items()}
    arrays = {
        "tokens": tokens,
        "greedy": np.array(hf.hf_greedy(judge, tokens, 48)),
        "float32/logits": hf.hf_logits(judge, tokens),
        "float64/logits": hf.hf_logits(hf.hf_model(model.config, params64, "float64"), tokens).astype(np.float32),
    }
    manifest = npllama.checkpoint.sha256(npllama.checkpoint.demo_path() / "manifest.json")
    np.savez_compressed(GOLDENS / "demo.npz", about=about(prompt=DEMO_PROMPT, manifest_sha256=manifest), **arrays)


def main() -> None:
    torch.set_num_threads(1)
    GOLDENS.mkdir(exist_ok=True)
    make_ops()
    make_frequencies()
    for name, case in cases.MODEL_CASES.items():
        make_model(name, case)
    make_demo()
    for path in sorted(GOLDENS.glob("*.npz")):
        print(f"{path.stat().st_size:>9,}  {path.name}")


if __name__ == "__main__":
    main()
