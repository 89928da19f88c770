"""uvicorn's server, with an end to running requests at shutdown."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from .worker import Worker

GRACE = 7.0  # seconds that running requests get to finish after SIGTERM; with the answers to the others it takes at most ten


class Server(uvicorn.Server):
    """Serve until SIGTERM, Ctrl-C or the loss of a rank.

    Requests then get `grace` seconds to finish, and those that haven't end with an error.
    `started` is called once signals are handled and requests are answered.

    Without this, uvicorn would cancel them at its own time limit: the client loses its connection, and a traceback is printed.
    """

    def __init__(
        self, app: ASGIApp, worker: Worker, grace: float = GRACE, started: Callable[[], object] = lambda: None, **options: Any
    ):
        config = {
            "log_level": "warning",
            "access_log": False,
            "timeout_graceful_shutdown": math.ceil(grace) + 1,
            "timeout_keep_alive": 75,  # uvicorn's five seconds end connections that clients are about to use again
            "server_header": False,
            "lifespan": "on",
        }
        super().__init__(uvicorn.Config(app, **{**config, **options}))
        self._worker, self._grace, self._started = worker, grace, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer requests."""
        await super().startup(sockets)
        if self.started:
            self._started()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down, which uvicorn asks ten times a second."""
        return await super().on_tick(counter) or self._worker.lost is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for requests to finish, as long as the grace lasts."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._worker.abort)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
