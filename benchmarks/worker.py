"""One implementation in a process of its own, so that its memory and its threads are its own: reads commands, answers in JSON.

    python -m benchmarks.worker npllama|torch MODEL_DIRECTORY

Commands on standard input: `prefill N`, `decode N`, `memory`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROMPT = 16  # tokens before a decode


def start_npllama(path: str) -> tuple[Callable[[np.ndarray], None], Callable[[int], None]]:
    import npllama
    from npllama.generation import prefill

    model = npllama.load(path, dtype="float32")
    prompt = np.arange(PROMPT) % model.config.vocab_size

    def run_prefill(tokens: np.ndarray) -> None:
        prefill(model, tokens % model.config.vocab_size, npllama.KVCache(model.config))

    def prepare_decode() -> Callable[[int], None]:
        cache = npllama.KVCache(model.config)
        prefill(model, prompt, cache)

        def run(n: int) -> None:
            for i in range(n):
                npllama.forward(model.params, model.config, [i % model.config.vocab_size], cache, last_only=True)

        return run

    return run_prefill, prepare_decode


def start_torch(path: str) -> tuple[Callable[[np.ndarray], None], Callable[[int], None]]:
    import torch

    import npllama

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import hf_reference

    torch.set_num_threads(len(hf_reference_cpus()))
    model = npllama.load(path, dtype="float32")
    config, hf = model.config, hf_reference.hf_model(model.config, model.params)
    del model
    prompt = torch.arange(PROMPT)[None] % config.vocab_size

    @torch.inference_mode()
    def run_prefill(tokens: np.ndarray) -> None:
        hf(torch.from_numpy(tokens % config.vocab_size)[None], use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def prepare_decode() -> Callable[[int], None]:
        cache = hf(prompt, use_cache=True, logits_to_keep=1).past_key_values

        @torch.inference_mode()
        def run(n: int) -> None:
            for i in range(n):
                hf(torch.tensor([[i % config.vocab_size]]), past_key_values=cache, use_cache=True, logits_to_keep=1)

        return run

    return run_prefill, prepare_decode


def hf_reference_cpus() -> set[int]:
    import os

    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def peak_memory() -> int | None:
    """The process's largest resident size so far, in bytes."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    started = time.perf_counter()
    run_prefill, prepare_decode = {"npllama": start_npllama, "torch": start_torch}[sys.argv[1]](sys.argv[2])
    run_prefill(np.arange(PROMPT))
    print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "memory":
            answer = {"bytes": peak_memory()}
        else:
            n = int(numbers[0])
            run = prepare_decode() if command == "decode" else None  # its prompt is not part of the time
            started = time.perf_counter()
            if run:
                run(n)
            else:
                run_prefill(np.arange(n))
            answer = {"seconds": time.perf_counter() - started}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
