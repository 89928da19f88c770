"""Record what npllama/golden/conformance/recorded.json holds: a case's tolerances, the mistakes it catches, its inputs' hash.

    python tests/record_conformance.py [L7 L3/forward ...]

To be run when a case or the list of mistakes has changed; levels or paths limit it to those.
tests/golden/conformance/ measures some of it again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from npllama.checkpoint.foreign import read_json
from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.measuring import exact, measure
from npllama.golden.conformance.model_files import files_of, forms_of, model_at
from npllama.golden.conformance.models import MODELS
from npllama.golden.conformance.suite import RECORDED

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from checksums import weighted_sum


def main() -> None:
    chosen = tuple(sys.argv[1:])
    before = read_json(RECORDED, ValueError)["cases"] if chosen else {}
    found, of_model = {}, {}
    for path, case in cases().items():
        if chosen and not path.startswith(chosen) and path in before:
            found[path] = before[path]
            continue
        key = model_at(case.constants["path"]).name if case.operation.name == "forward_file" else path
        if key not in of_model:  # a model is the same in each form
            of_model[key] = measure(case)
        measured = of_model[key]
        tolerances = {
            output: {
                profile: {key: value for key, value in asdict(tolerance).items() if value is not False}
                for profile, tolerance in of_output.items()
            }
            for output, of_output in measured.tolerances.items()
        }
        sums = {name: weighted_sum(y) for name, y in exact(case).items()}
        found[path] = {"inputs": case.sha256(), "tolerances": tolerances, "sums": sums, "catches": list(measured.catches)}
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(entry)}" for path, entry in found.items())
    models = {
        path: hashlib.sha256(data).hexdigest()
        for model in MODELS.values()
        for form in forms_of(model)
        for path, data in files_of(model, form).items()
    }
    text = f'{{\n "cases": {{\n{lines}\n }},\n "models": {json.dumps(models, indent=2)}\n}}\n'
    RECORDED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
