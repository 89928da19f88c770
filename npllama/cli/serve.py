"""npllama serve: run an HTTP server with OpenAI's API."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

import numpy as np

from ..chat import FORMATS, ChatError, ChatFormat, chat_format
from ..checkpoint import Model
from ..engine.memory import available_memory
from .options import Commands, add_command, add_model_options, add_processes_option, load_model


def add_parser(commands: Commands) -> None:
    """Declare the command and its options."""
    p = add_command(commands, "serve", run, "answer HTTP requests in OpenAI's API")
    add_model_options(p)
    add_processes_option(p)
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: only this machine can connect)"
    )
    p.add_argument("--port", type=int, default=8080, help="port to listen on; 0: any free one (default 8080)")
    p.add_argument("--name", help="the model's name in the API (default: that of its directory)")
    p.add_argument("--format", help=f"chat format: {', '.join(FORMATS)}, or the name of one of the model's templates")
    p.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="texts decoded together (default: 8, fewer if half of the free memory holds fewer)",
    )
    p.add_argument(
        "--queue", type=int, default=64, metavar="N", help="most texts waiting; further ones are refused with 429 (default 64)"
    )
    p.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of a prompt and its answer together (default: the model's context)",
    )
    p.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="most bytes of a request (default 1048576)")
    p.add_argument(
        "--time-limit", type=float, default=600, metavar="S", help="most seconds for a request, its wait included (default 600)"
    )
    p.add_argument("--api-key", metavar="KEY", help="require this key from clients (default: $NPLLAMA_API_KEY, or none)")
    p.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let web pages of this origin use the server (CORS)"
    )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from ..serve.app import LOOPBACK, Settings, make_app
        from ..serve.server import Server
        from ..serve.worker import Worker
    except ImportError:
        raise ImportError("npllama serve needs starlette and uvicorn: pip install 'npllama[serve]'") from None
    for option, value in (("--queue", args.queue + 1), ("--max-body", args.max_body), ("--time-limit", args.time_limit)):
        if not value > 0:
            raise ValueError(f"{option} is out of range")
    key = args.api_key if args.api_key is not None else os.environ.get("NPLLAMA_API_KEY")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError("the API key is empty or not printable ASCII: no client could send it")
    listening = listen(args.host, args.port)
    with listening:
        model = load_model(args)
        context = model.config.max_seq_len if args.context is None else args.context
        if not 0 < context <= model.config.max_seq_len:
            raise ValueError(f"--context is {context}, expected 1 to the model's {model.config.max_seq_len}")
        rows = args.rows if args.rows is not None else rows_for(model, context)
        if rows < 1:
            raise ValueError(f"--rows is {rows}, expected 1 or more")
        format = chat_format_or_reason(model, args.format)
        host, port = listening.getsockname()[:2]
        settings = Settings(
            args.name or (model.path.resolve().name if model.path else "npllama"),
            context,
            args.max_body,
            args.time_limit,
            key,
            tuple(args.allow_origin),
            LOOPBACK if host in LOOPBACK else None,
        )
        worker = Worker(model, rows, args.queue)
        address = f"[{host}]" if ":" in host else host
        line = f"{settings.name} at http://{address}:{port}/v1 ({rows} rows, context {context:,})"
        app = make_app(model, worker, format, settings)
        server = Server(app, worker, started=lambda: print(line, file=sys.stderr, flush=True))
        # uvicorn finishes running requests, then raises the signal again: after SIGTERM this exits with status 0.
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            server.run([listening])
        finally:
            signal.signal(signal.SIGTERM, before)
            worker.close()
            worker.join(1)
        if worker.lost is not None:
            raise worker.lost


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, opened before the model is loaded. Raises ValueError for an unavailable address."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port is {port}, expected 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except BaseException:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise ValueError(f"can't listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from None
    return listening


def chat_format_or_reason(model: Model, name: str | None) -> ChatFormat | ChatError:
    """Return the model's chat format, or the error that chat requests get without one. Raises ChatError for a bad `name`."""
    try:
        return chat_format(model, name)
    except ChatError as error:
        if name is not None:
            raise
        return error


def rows_for(model: Model, context: int) -> int:
    """Return how many rows with a full context fit half of the free memory, 1 to 8."""
    config = model.config
    size = 2 * config.n_layers * config.n_kv_heads * config.head_dim * context * np.dtype(np.float32).itemsize
    return int(min(8, max(1, available_memory() // 2 // size)))
