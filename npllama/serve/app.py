"""The routes: OpenAI's API, llama.cpp's /tokenize, /detokenize and /health, and a page to try a model on."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..chat import ChatError, ChatFormat
from ..checkpoint import Model, foreign
from ..errors import printable, reason, shown
from ..generation import check_prompt
from ..text.completion import Continuation
from .choices import ChatChoices, Choices, CompletionChoices
from .replies import usage_of
from .requests import BadRequest, Fields, Generation, chat_request, completion_request, is_bool
from .worker import Closed, Full, Job, Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere and sends requests to this server only.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Settings:
    """Name and limits of the server.

    name           the model's name in the API
    context        most tokens of a prompt and its continuation together
    most_bytes     most bytes of a request's body
    most_seconds   time limit of one request, its wait in the queue included
    api_key        required on every route except / and /health, as `Authorization: Bearer KEY`; None: no key
    origins        web pages of these origins may use the server (CORS); empty: only its own page
    hosts          accepted Host headers, against DNS rebinding; None: any
    """

    name: str
    context: int
    most_bytes: int = 1 << 20
    most_seconds: float = 600.0
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = LOOPBACK


def make_app(model: Model, worker: Worker, format: ChatFormat | ChatError, settings: Settings) -> Starlette:
    """Return the ASGI application, which closes the worker on shutdown."""
    api = _API(model, worker, format, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        worker.close()

    middleware = [Middleware(Guard, settings=settings)]
    if settings.origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["Authorization", "Content-Type"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(settings.origins), **allowed))
    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        BadRequest: lambda request, error: failure(str(error), error.status, error.param, error.code),
        Full: lambda request, error: failure(str(error), 429, code="queue_full", headers={"Retry-After": "1"}),
        Closed: lambda request, error: failure(str(error), 503),
        HTTPException: lambda request, error: failure(error.detail, error.status_code, headers=error.headers),
        Exception: lambda request, error: failure("an unforeseen error; see the server's standard error", 500),
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


def failure(message: str, status: int, param: str | None = None, code: str | None = None, headers: Any = None) -> JSONResponse:
    """Return an error response in OpenAI's form."""
    return JSONResponse({"error": error_of(message, status, param, code)}, status, headers)


def error_of(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the error object of OpenAI's API."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 404: "not_found_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    named = None if param is None else printable(param)  # of an unknown parameter, which may have any name
    return {"message": printable(message), "type": kind, "param": named, "code": code}


class Guard:
    """Refuse requests with an unexpected Host header, without the API key, or with a body that isn't declared as JSON.

    A web page of another origin can post a form here, but neither JSON nor a key: for these the browser first sends a
    preflight request, which is refused.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or pass the request to the application."""
        refused = self._refused(Request(scope)) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)

    def _refused(self, request: Request) -> Response | None:
        settings = self._settings
        host = (
            request.headers.get("host", "").rpartition("]")[0].lstrip("[") or request.headers.get("host", "").partition(":")[0]
        )
        if settings.hosts is not None and host not in settings.hosts:
            return failure(f"the host is {shown(host)}, expected {' or '.join(settings.hosts)}", 403)
        if settings.api_key is not None and request.url.path not in ("/", "/health"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, settings.api_key.encode()):
                return failure("the API key is missing or wrong", 401, code="invalid_api_key")
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return failure(f"the content type is {shown(kind)}, expected application/json", 415)
        return None


class _API:
    def __init__(self, model: Model, worker: Worker, format: ChatFormat | ChatError, settings: Settings):
        self._model, self._worker, self._format, self._settings = model, worker, format, settings
        self._started = int(time.time())

    # ---------------------------------------------------------------------------------------------------------- simple routes

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._about())

    async def tokenize(self, request: Request) -> Response:
        """Encode a text, as llama.cpp: {"content": ..., "add_special": false, "parse_special": true, "with_pieces": false}."""
        fields = Fields(await self._json(request))
        content = fields.take("content", lambda x: isinstance(x, str), "a text", "")
        bos, special, pieces = (
            bool(fields.take(name, is_bool, "true or false", default))
            for name, default in (("add_special", False), ("parse_special", True), ("with_pieces", False))
        )
        fields.refuse_others()
        tokenizer = self._tokenizer()
        ids = await run_in_threadpool(tokenizer.encode, content, bos=bos, special=special)
        return JSONResponse({"tokens": [{"id": id, "piece": tokenizer.piece(id)} for id in ids] if pieces else ids})

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await self._json(request))
        ids = fields.take("tokens", lambda x: isinstance(x, list) and all(type(id) is int for id in x), "a list of ids", [])
        fields.refuse_others()
        try:
            return JSONResponse({"content": self._tokenizer().decode(ids)})
        except ValueError as error:
            raise BadRequest(str(error), "tokens") from None

    # ------------------------------------------------------------------------------------------------------------ completions

    async def completions(self, request: Request) -> Response:
        asked = completion_request(await self._json(request), self._model.generation)
        self._check_name(asked.model)
        self._check_count(len(asked.prompts), asked.n)
        prompts = [await run_in_threadpool(self._ids, prompt) for prompt in asked.prompts]
        run = self._start(asked, prompts, asked.logprobs if asked.echo else None, asked.logprobs)
        choices = CompletionChoices(self._model, self._settings.name, asked, run.jobs)
        return await self._answer(request, asked, run, prompts, choices)

    async def chat(self, request: Request) -> Response:
        asked = chat_request(await self._json(request), self._model.generation)
        self._check_name(asked.model)
        self._check_count(1, asked.n)
        if isinstance(self._format, ChatError):
            raise BadRequest(str(self._format), "messages")
        try:
            prompt = await run_in_threadpool(self._format.prompt, asked.messages)
        except ValueError as error:
            raise BadRequest(str(error), "messages") from None
        run = self._start(asked, [prompt.ids])
        choices = ChatChoices(self._model, self._settings.name, asked, run.jobs)
        return await self._answer(request, asked, run, [prompt.ids], choices)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return self._tokenizer().encode(prompt, bos=True)

    def _start(
        self,
        asked: Generation,
        prompts: Sequence[list[int]],
        echo_logprobs: int | None = None,
        stop_alternatives: int | None = None,
    ) -> _Run:
        """Queue one text for each choice. Raises BadRequest for a prompt that can't be continued."""
        if asked.stop and self._model.tokenizer is None:
            raise BadRequest("the model has no tokenizer, so stop strings can't be used", "stop")
        run = _Run(self._settings.most_seconds, told_always=asked.stream)
        for ids in prompts:
            try:
                check_prompt(ids, self._model)
            except ValueError as error:
                raise BadRequest(str(error), "prompt") from None
            room = self._settings.context - len(ids)
            if room < 0:
                found = f"the prompt has {len(ids):,} tokens, the context holds {self._settings.context:,}"
                raise BadRequest(found, "prompt", "context_length_exceeded")
            most = room + 1 if asked.max_tokens is None else asked.max_tokens
            within = min(most, room + 1)
            for i in range(asked.n):
                continuation = Continuation(self._model, ids, within, asked.stop, asked.logprobs)
                seed = (asked.seed, i) if asked.n > 1 else (asked.seed,)
                logprobs = (echo_logprobs, stop_alternatives)
                run.add(Job(continuation, asked.sampling, seed, lambda text: None, within, *logprobs))
        self._worker.submit(run.jobs)
        return run

    async def _answer(
        self, request: Request, asked: Generation, run: _Run, prompts: Sequence[list[int]], choices: Choices
    ) -> Response:
        if asked.stream:
            return _Stream(self._events(asked, run, prompts, choices), lambda: self._worker.cancel(run.jobs))
        try:
            await run.wait(request.is_disconnected)
        finally:
            self._worker.cancel(run.jobs)
        made = [choices.whole(i, job) for i, job in enumerate(run.jobs)]
        return JSONResponse(choices.reply.whole(made, self._usage(prompts, run)))

    async def _events(
        self, asked: Generation, run: _Run, prompts: Sequence[list[int]], choices: Choices
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        try:
            for event in choices.opening():
                yield _event(choices.reply.event([event]))
            async for i, text, n_tokens, ended in run.pieces():
                if (choice := choices.piece(i, run.jobs[i], text, n_tokens, ended)) is not None:
                    yield _event(choices.reply.event([choice]))
            if asked.include_usage:
                yield _event(choices.reply.event([], self._usage(prompts, run)))
            yield b"data: [DONE]\n\n"
        except BadRequest as error:
            yield _event({"error": error_of(str(error), error.status, error.param, error.code)})

    # --------------------------------------------------------------------------------------------------------------- helpers

    def _usage(self, prompts: Sequence[list[int]], run: _Run) -> dict[str, int]:
        return usage_of(prompts, [job.continuation.completion for job in run.jobs])

    def _about(self) -> dict[str, Any]:
        return {"id": self._settings.name, "object": "model", "created": self._started, "owned_by": "npllama"}

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self._settings.name):
            message = f"the model {shown(name)} is not served here, expected {self._settings.name}"
            raise BadRequest(message, "model", "model_not_found", 404)

    def _check_count(self, n_prompts: int, n: int) -> None:
        """Refuse more texts than ever fit, before anything is made for each: a small body can ask for millions."""
        most = self._worker.rows + self._worker.most
        if n_prompts * n > most:
            found = f"the request asks for {n_prompts * n:,} texts ({n_prompts:,} prompts with n of {n})"
            raise BadRequest(f"{found}, expected at most {most:,}", "n" if n > most else "prompt")

    def _tokenizer(self) -> Any:
        if self._model.tokenizer is None:
            raise BadRequest("the model has no tokenizer: found text, expected token ids")
        return self._model.tokenizer

    async def _json(self, request: Request) -> object:
        """Return the body parsed as JSON. Raises BadRequest for a body over the limit or that isn't JSON."""
        data = bytearray()
        try:
            async for part in request.stream():
                data += part
                if len(data) > self._settings.most_bytes:
                    raise BadRequest(f"the body is longer than {self._settings.most_bytes:,} bytes", status=413)
        except ClientDisconnect:  # while it sent the request: nobody reads this answer, and the log needs no traceback
            raise BadRequest("the client has disconnected", status=499) from None
        try:
            return foreign.parse_json(bytes(data))
        except ValueError as error:
            raise BadRequest(f"the body can't be parsed as JSON: {reason(error)}") from None
        except TypeError as error:
            raise BadRequest(f"the body is {error}, expected a JSON object") from None


class _Stream(StreamingResponse):
    """Send server-sent events; `after` is called at their end, or when the client disconnects, even before the first."""

    def __init__(self, events: AsyncIterator[bytes], after: Callable[[], object]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


def _event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


class _Run:
    """The texts of one request, and the worker's reports on them.

    told_always  report each piece of text as it is made (for a stream), instead of the end alone
    """

    def __init__(self, seconds: float, told_always: bool):
        self.jobs: list[Job] = []
        self._loop, self._until, self._always = asyncio.get_running_loop(), time.monotonic() + seconds, told_always
        self._seconds = seconds
        self._told: asyncio.Queue[tuple[int, str, int, bool]] = asyncio.Queue()

    def add(self, job: Job) -> None:
        """Add a text, and let the worker report on it to this request's event loop."""
        i = len(self.jobs)

        def tell(text: str) -> None:  # on the worker's thread
            if job.ended or self._always:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    done = job.continuation.completion
                    self._loop.call_soon_threadsafe(self._told.put_nowait, (i, text, len(done.tokens), job.ended))

        job.tell = tell
        self.jobs.append(job)

    async def pieces(self, gone: Callable[[], Awaitable[bool]] | None = None) -> AsyncIterator[tuple[int, str, int, bool]]:
        """Yield the worker's reports until all texts have ended: choice, new text, tokens so far, whether it has ended.

        Raises BadRequest for a text's error, at the time limit, and when `gone` finds that the client has disconnected.
        """
        left = len(self.jobs)
        while left:
            try:
                told = await asyncio.wait_for(self._told.get(), min(0.5, max(0.01, self._until - time.monotonic())))
            except (TimeoutError, asyncio.TimeoutError):
                if time.monotonic() >= self._until:
                    raise BadRequest(f"the answer took longer than {self._seconds:g} seconds", status=504) from None
                if gone is not None and await gone():
                    raise BadRequest("the client has disconnected", status=499) from None
                continue
            if (error := self.jobs[told[0]].error) is not None:
                raise BadRequest(str(error), status=503 if isinstance(error, Closed) else 500)
            left -= told[3]
            yield told

    async def wait(self, gone: Callable[[], Awaitable[bool]]) -> None:
        """Wait until all texts have ended. Raises BadRequest as pieces() does."""
        async for _ in self.pieces(gone):
            pass
