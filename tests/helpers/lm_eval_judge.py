"""Run lm-evaluation-harness on local tasks, without a network: python tests/helpers/lm_eval_judge.py HF_FOLDER URL TASKS

Evaluates the folder in torch by its own `hf` backend and the server at URL by `local-completions`, and prints both results:
{"hf" | "api": {task: {"acc" ...: number, "samples": [[answer of each request] of each document]}}}.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder, url, tasks = sys.argv[1:]
    names = sorted(entry.removesuffix(".yaml") for entry in os.listdir(tasks) if entry.endswith(".yaml"))
    manager = TaskManager(include_path=tasks, include_defaults=False)
    api = {"base_url": url, "model": "demo", "tokenizer": folder, "tokenizer_backend": "huggingface", "num_concurrent": 4}
    models = {
        "hf": ("hf", {"pretrained": folder, "dtype": "float32", "device": "cpu"}),
        "api": ("local-completions", api),
    }
    found = {}
    for kind, (backend, arguments) in models.items():
        arguments["add_bos_token"] = True  # the two have different defaults
        done = lm_eval.simple_evaluate(
            backend, arguments, tasks=names, task_manager=manager, bootstrap_iters=0, batch_size=1, log_samples=True
        )
        found[kind] = {
            name: {
                **{key.partition(",")[0]: value for key, value in done["results"][name].items() if isinstance(value, float)},
                "samples": [sample["filtered_resps"] for sample in sorted(done["samples"][name], key=lambda s: s["doc_id"])],
            }
            for name in names
        }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
