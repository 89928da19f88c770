"""Measure the differences between npllama's numbers and torch's:  python -m benchmarks.accuracy

Prints the table of docs/accuracy.md: the largest relative error (largest difference over the reference's largest magnitude) of
each operation against torch.nn.functional, and of the tiny models' logits against Hugging Face's LlamaForCausalLM; in
float64 against a judge that really computes in float64 (tests/helpers/hf_reference.py). The last column is torch's own float32
error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))

from npllama import ops

import cases
import hf_reference as hf
from tiny import random_params, relative_error


def run() -> dict[str, dict[str, float]]:
    """Return the errors: name -> dtype -> error."""
    errors: dict[str, dict[str, float]] = {}
    for name in cases.OPS:
        row = errors[name] = {}
        for dtype in cases.DTYPES:
            inputs = cases.op_inputs(dtype)[name]
            row[dtype] = relative_error(cases.OPS[name](**inputs), hf.torch_op(name, inputs))
        exact = cases.OPS[name](**cases.op_inputs("float64")[name])
        row["torch_float32"] = relative_error(hf.torch_op(name, cases.op_inputs("float32")[name]), exact)
    for name, case in cases.MODEL_CASES.items():
        params, config = random_params(case.config, seed=7), case.config
        params64 = {key: x.astype(np.float64) for key, x in params.items()}
        same = ops.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, "float32") if case.long else None
        single = hf.hf_logits(hf.hf_model(config, params, frequencies=same), case.tokens)[..., -case.n_compared :, :]
        exact = hf.hf_logits(hf.hf_model(config, params64, "float64"), case.tokens)[..., -case.n_compared :, :]
        errors["logits: " + name] = {
            "float32": relative_error(case.logits(params), single),
            "float64": relative_error(case.logits(params64), exact),
            "torch_float32": relative_error(single, exact),
        }
    return errors


def main() -> None:
    errors = run()
    print(f"{'':<30}{'float32':>12}{'float64':>12}{'torch float32 against float64':>32}")
    for name, row in errors.items():
        print(f"{name:<30}{row['float32']:>12.1e}{row['float64']:>12.1e}{row['torch_float32']:>32.1e}")
    for kind, bounds in (("operations", cases.OP_BOUND), ("logits", cases.LOGITS_BOUND)):
        worst = {
            dtype: max(row[dtype] for name, row in errors.items() if name.startswith("logits") == (kind == "logits"))
            for dtype in cases.DTYPES
        }
        print(f"{kind}: worst " + ", ".join(f"{d} {worst[d]:.1e} (test's bound {bounds[d]:.1e})" for d in cases.DTYPES))
    for name, shape in cases.ROPE_SHAPES.items():
        same = np.mean(ops.rope_frequencies(*shape, "float32") == hf.torch_frequencies(shape))
        print(f"RoPE frequencies of {name}: {same:.1%} are torch's to the bit")
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
