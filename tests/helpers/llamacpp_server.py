"""Run llama.cpp's HTTP server on one GGUF file, in a separate process: python tests/helpers/llamacpp_server.py FILE.gguf

Prints its address, then answers until standard input ends. `LlamaCpp` starts it and asks it.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit


class LlamaCpp:
    """A running server, as a context manager. The server ends with the context, and when this process ends in any way."""

    def __init__(self, path: Path):
        self.log = path.with_suffix(".log").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        # What llama.cpp prints itself goes to standard output too.
        address = next((line.split()[1] for line in self.process.stdout if line.startswith("listening ")), None)
        if address is None:
            self.close()
            raise RuntimeError(f"llama.cpp didn't open {path}: its messages are in {self.log.name}")
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)

    def ask(self, route: str, **values: object) -> dict[str, object]:
        self.connection.request("POST", route, json.dumps(values), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{route}: {response.status} {answer[:500]!r}")
        return json.loads(answer)

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of the text; the spelling of special tokens stays plain text."""
        return self.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def tokenize_special(self, text: str) -> list[int]:
        """Return the ids of the text; the spelling of special tokens is parsed as these tokens."""
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def close(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
        self.process.stdin.close()  # which ends it
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 512
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_prompt = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # its sums are in float16
    params.warmup = False
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"listening {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
