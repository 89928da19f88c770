"""Audit released implementations of Llama:  python -m benchmarks.audit [--only NAME ...] [--list] [--work DIR]

Installs each with pip in an environment of its own, runs the conformance suite and a trace through it, and writes
docs/audit.json and docs/audit.md. What is installed and computed stays in the work folder. One that fails, or takes too long,
stops no other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import npllama
from npllama.golden.conformance import export

from . import published, report
from .environments import ROOT, NotInstalled, environment, import_path
from .implementations import IMPLEMENTATIONS, Implementation, Variant
from .judging import GRADED, Outcome, grade_suite, judge_traces, read_outcomes

ADAPTERS = Path(__file__).with_name("adapters")
RUN_SECONDS = 900
LEVELS = ("L0", "L3", "L4", "L5", "L6")
LARGE = 500  # megabytes


def prepared(work: Path) -> tuple[Path, Path]:
    """Return the folders of the suite and of the published models, which are written if they don't exist."""
    suite, models = work / "vectors", work / "models"
    if not (suite / "suite.json").exists():
        export(suite, LEVELS, "npy", force=True)
    for name, model in published.MODELS.items():
        published.write(model, models / name)
    return suite, models


def tokenizers() -> dict[str, str]:
    """Return the available files of published tokenizers, by their sha256."""
    from npllama.golden.conformance.texts import TOKENIZERS

    shared = os.environ.get("NPLLAMA_SHARED_DATA")
    files = {
        "llama_2": os.environ.get("NPLLAMA_LLAMA2_TOKENIZER") or (shared and f"{shared}/llama2-tokenizer/tokenizer.model"),
        "llama_3": os.environ.get("NPLLAMA_LLAMA3_TOKENIZER"),
    }
    return {TOKENIZERS[name][1]: file for name, file in files.items() if file and Path(file).exists()}


def run_adapter(python: Path, script: Path, folder: Path, seconds: float, more: Mapping[str, str]) -> str:
    """Run an adapter on the job in a folder; return why it ended early, or nothing."""
    log = folder / "log.txt"
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | one_thread | more
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as output:
        try:
            done = subprocess.run(
                [str(python), str(script), str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {seconds:g} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"it ended with status {done.returncode}: {lines[-1].strip()[:300] if lines else 'it said nothing'}"


def results_of(implementation: Implementation, variant: Variant, work: Path) -> Path:
    """Return the folder of a variant's job and results."""
    return work / "results" / "-".join([implementation.name, *variant.name.split()])


def audit(
    implementation: Implementation,
    variant: Variant,
    work: Path,
    python_of: Callable[[], Path],
    adapters: Path = ADAPTERS,
    seconds: float = RUN_SECONDS,
    judge_only: bool = False,
) -> Outcome:
    """Run one variant of an implementation (not with judge_only), and judge its results."""
    outcome = Outcome(
        name=implementation.name,
        title=implementation.title,
        variant=variant.name,
        profile=variant.profile,
        form=implementation.form,
        packages=[*implementation.packages, *implementation.without_dependencies],
        note=implementation.note,
    )
    try:
        python = python_of()
    except NotInstalled as error:
        outcome.stopped = f"not installed: {error}"
        return outcome
    suite, models = prepared(work)
    folder = results_of(implementation, variant, work)
    if not judge_only:
        run_variant(implementation, variant, work, python, adapters, seconds)
    if (folder / "stopped.txt").exists():
        outcome.stopped = (folder / "stopped.txt").read_text(encoding="utf-8")
    lines = read_outcomes(folder / "outcomes.jsonl")
    outcome.versions = next((line["versions"] for line in lines if "versions" in line), {})
    grade_suite(outcome, lines, folder, suite, LEVELS)
    judge_traces(outcome, lines, folder, models, implementation, variant)
    return outcome


def run_variant(
    implementation: Implementation, variant: Variant, work: Path, python: Path, adapters: Path, seconds: float
) -> None:
    """Run an adapter in its environment; its results, and the reason if it ended early, go to its folder."""
    suite, models, folder = work / "vectors", work / "models", results_of(implementation, variant, work)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcomes.jsonl").unlink(missing_ok=True)
    for written in ("results", "published"):
        shutil.rmtree(folder / written, ignore_errors=True)
    names = [name for name in published.MODELS if implementation.form == "safetensors" or name not in published.SAME_WEIGHTS]
    job = {
        "suite": str(suite),
        "published": {name: str(models / name) for name in names},
        "tokens": published.TOKENS,
        "variant": variant.name,
        "tokenizers": tokenizers(),
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1))
    more = {"PYTHONPATH": str(import_path(work))} if implementation.own_npllama else {}
    stopped = run_adapter(python, adapters / implementation.adapter, folder, seconds, more)
    (folder / "stopped.txt").write_text(stopped, encoding="utf-8")


def content_of(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return docs/audit.json."""
    sizes = {"n_tokens": len(published.TOKENS), "layers": published.LAYERS, "dim": published.DIM}
    return {
        "format": "npllama audit 1",
        "npllama": npllama.__version__,
        "levels": list(LEVELS),
        "operations": list(GRADED),
        "sizes": sizes,
        "models": report.described(published.MODELS),
        "outcomes": list(outcomes),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", help=f"audit only these of {', '.join(IMPLEMENTATIONS)}"
    )
    parser.add_argument("--list", action="store_true", help="list the packages, and the size of their download")
    parser.add_argument("--judge", action="store_true", help="run nothing: judge the results in the work folder again")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path.home() / ".cache" / "npllama-audit",
        metavar="DIR",
        help="for environments, models and results (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="for audit.json and audit.md")
    args = parser.parse_args(arguments)
    if args.list:
        for one in IMPLEMENTATIONS.values():
            packages = " ".join([*one.packages, *one.without_dependencies]) or one.why_not
            large = " (more than 500 MB)" if one.megabytes > LARGE else ""
            size = "" if one.why_not else f", about {one.megabytes} MB{large}"
            print(f"{one.name}: {packages}{size}")
        return
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    file = args.out / "audit.json"
    for name in args.only or IMPLEMENTATIONS:
        one = IMPLEMENTATIONS[name]
        for variant in one.variants:
            if args.judge and not (results_of(one, variant, work) / "outcomes.jsonl").exists():
                continue
            print(f"{name} {variant.name}".strip(), flush=True)
            outcome = audit(one, variant, work, lambda one=one: environment(one, work / "environments"), judge_only=args.judge)
            before = json.loads(file.read_text(encoding="utf-8"))["outcomes"] if file.exists() else []
            kept = {(outcome["name"], outcome["variant"]): outcome for outcome in before}
            kept[name, variant.name] = json.loads(json.dumps(outcome.as_dict()).replace(str(work), "audit"))
            order = [(one.name, v.name) for one in IMPLEMENTATIONS.values() for v in one.variants]
            content = content_of([kept[key] for key in order if key in kept])
            file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            (args.out / "audit.md").write_text(report.page(content), encoding="utf-8")
            findings = f"{len(outcome.findings)} findings"
            levels = ", ".join(f"{level} {found.text}" for level, found in outcome.levels.items() if found.text)
            traces = ", ".join(f"{model} {t.state}" for model, t in outcome.traces.items())
            print("  " + "; ".join(part for part in (outcome.stopped, levels, traces, findings) if part), flush=True)


if __name__ == "__main__":
    sys.exit(main())
