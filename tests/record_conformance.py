"""Record what npllama/golden/conformance/recorded.json holds: a case's tolerances, the mistakes it catches, its inputs' hash.

    python tests/record_conformance.py

To be run when a case or the list of mistakes has changed. tests/golden/conformance/ measures some of it again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from npllama.golden.conformance.cases import cases
from npllama.golden.conformance.measuring import exact, measure
from npllama.golden.conformance.suite import RECORDED

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
from checksums import weighted_sum


def main() -> None:
    found = {}
    for path, case in cases().items():
        measured = measure(case)
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
    RECORDED.write_text(f'{{\n "cases": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
