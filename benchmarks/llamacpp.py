"""Run llama.cpp on our weights: answers benchmarks.worker's commands.

    python -m benchmarks.llamacpp MODEL_DIRECTORY

llama.cpp is used through xllamacpp, which has wheels; llama-cpp-python is compiled while it is installed. The weights are
written to a GGUF file in float32, so they are ours bit for bit. The settings are llama.cpp's defaults (its choice of flash
attention, keys and values in float16), except for batches of 512 tokens and no reuse of an earlier prompt. The times are those
that its server reports: of the prompt, and of the tokens after the first, whose logits are the prompt's.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

import npllama
from npllama.checkpoint import open_model
from npllama.engine.threads import n_threads

from .worker import PROMPT, peak_memory

CONTEXT = 1024  # room for a prompt of 512 tokens and what follows; llama.cpp fills its whole cache with zeros at the start


def write_float32_gguf(path: Path, directory: str) -> None:
    """Write the parameters under GGUF's names, with a dummy vocabulary: llama.cpp opens no file without one."""
    model = npllama.load(directory, dtype="float32")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
    import foreign

    vocabulary = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__tokens": [f"t{i}" for i in range(model.config.vocab_size)],
        "tokenizer__ggml__token_type": [1] * model.config.vocab_size,
        "tokenizer__ggml__merges": ["t 0"],
    }
    foreign.write_gguf(path, model.config, model.params, **vocabulary)


class LlamaCpp:
    """A server of llama.cpp in this process, on one GGUF file."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = 512
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
        params.cache_prompt = False
        params.ui = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def complete(self, tokens: np.ndarray, n: int) -> dict[str, float]:
        """Compute the prompt and n greedy tokens; llama.cpp's own timings."""
        connection = http.client.HTTPConnection(urlsplit(self.server.listening_address).netloc)
        request = {"prompt": tokens.tolist(), "n_predict": n, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
        connection.request("POST", "/completion", json.dumps(request), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        timings = answer.get("timings", {})
        if (timings.get("prompt_n"), timings.get("predicted_n")) != (len(tokens), n):
            raise RuntimeError(f"llama.cpp did not compute {len(tokens)} and {n} tokens: {answer!s:.300}")
        return timings


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="npllama-llamacpp-") as folder:
        path = Path(folder) / "model.gguf"
        writing = multiprocessing.get_context("spawn").Process(target=write_float32_gguf, args=(path, sys.argv[1]))
        writing.start()  # in a process of its own: its memory isn't llama.cpp's
        writing.join()
        config = open_model(sys.argv[1]).config
        started = time.perf_counter()
        llama = LlamaCpp(path, min(config.max_seq_len, CONTEXT), n_threads())
        llama.complete(np.arange(PROMPT) % config.vocab_size, 1)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
        for line in sys.stdin:
            command, *numbers = line.split()
            if command == "memory":
                answer = {"bytes": peak_memory()}
            elif command == "prefill":
                tokens = np.arange(int(numbers[0])) % config.vocab_size
                answer = {"seconds": llama.complete(tokens, 1)["prompt_ms"] / 1000}
            else:
                timings = llama.complete(np.arange(PROMPT) % config.vocab_size, int(numbers[0]) + 1)
                answer = {"seconds": timings["predicted_ms"] / 1000}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
