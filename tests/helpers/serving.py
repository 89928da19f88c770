"""Run the server in threads of this process. Needs starlette and uvicorn."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import threading

from npllama.cli.serve import chat_format_or_reason
from npllama.serve.app import Settings, make_app
from npllama.serve.server import Server
from npllama.serve.worker import Worker


@dataclasses.dataclass
class Served:
    port: int
    worker: Worker
    key: str | None
    server: Server

    @property
    def client(self):
        url = f"http://127.0.0.1:{self.port}/v1"
        import openai

        return openai.OpenAI(base_url=url, api_key=self.key or "none", max_retries=0, timeout=60)

    def raw(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": "application/json", **names})
            reply = connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()

    def post(self, path: str, value: object, **headers: str) -> tuple[int, dict]:
        status, _, data = self.raw("POST", path, json.dumps(value).encode(), **headers)
        return status, json.loads(data)


@contextlib.contextmanager
def served(model, rows=4, most=64, grace=5.0, **settings):
    """Serve on a free port from threads of this process."""
    worker = Worker(model, rows, most)
    chosen = Settings("demo", **{"context": model.config.max_seq_len, **settings})
    app = make_app(model, worker, chat_format_or_reason(model, None), chosen)
    server = Server(app, worker, grace, log_level="critical")
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Served(listening.getsockname()[1], worker, chosen.api_key, server)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
        assert worker.join(10)
