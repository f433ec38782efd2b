"""The server's application: OpenAI's routes, and those for adapters, health and metrics.

app = make_app(served, folder, api_key="…")      # any ASGI server runs it; `run` runs it with uvicorn
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from jpeft.serving.http import metrics
from jpeft.serving.http.answering import Served, Texts, cancel
from jpeft.serving.http.bodies import Answer, Ask, read_ask, read_json
from jpeft.serving.http.errors import HTTPError
from jpeft.serving.http.folder import AdapterFolder

_MOST_BYTES = 16 << 20  # of a body
_GONE = 499  # the status for a client that went away, which nobody reads
_CREATED = int(time.time())
_LOG = logging.getLogger(__name__)


def make_app(
    served: Served, folder: AdapterFolder, api_key: str | None = None, timeout: float | None = None
) -> Starlette:
    """The application. Its engine is started with it, and drained when it shuts down.

    Args:
      served: the engine with its tokenizer.
      folder: the adapters that clients may load.
      api_key: the key that clients must give, for all but health and metrics.
      timeout: the most seconds for an answer; None: any number.

    >>> app = make_app(served, folder, api_key="secret", timeout=60)  # doctest: +SKIP
    """
    server = _Server(served, folder, api_key, timeout)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await run_in_threadpool(served.engine.close, drain=True)

    routes = [
        Route("/v1/models", server.guarded(server.models)),
        Route("/v1/models/{name:path}", server.guarded(server.model)),
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        Route("/v1/completions", server.guarded(server.completion), methods=["POST"]),
        Route("/v1/load_lora_adapter", server.guarded(server.load), methods=["POST"]),
        Route("/v1/unload_lora_adapter", server.guarded(server.unload), methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _not_served})


Endpoint = Callable[[Request], Awaitable[Response]]


class _Server:
    """The routes' functions."""

    def __init__(self, served: Served, folder: AdapterFolder, api_key: str | None, timeout: float | None):
        self.served, self.folder, self.api_key, self.timeout = served, folder, api_key, timeout

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """A function for those with the key, whose errors have OpenAI's form."""

        async def run(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except HTTPError as error:
                return _as_response(error)
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception:
                _LOG.exception("%s %s failed", request.method, request.url.path)
                return _as_response(HTTPError(500, "the server failed; its log says why"))

        return run

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which starlette reads as Latin-1.
        same = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
        if not (same and scheme.lower() == "bearer"):
            raise HTTPError(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY")

    # --- answers ---

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._answer(request, read_ask(await _body(request), chat=True))

    async def completion(self, request: Request) -> Response:
        """`/v1/completions`."""
        return await self._answer(request, read_ask(await _body(request), chat=False))

    async def _answer(self, request: Request, ask: Ask) -> Response:
        texts = Texts(self.served.tokenizer, ask)
        running = await run_in_threadpool(self.served.submit, ask, texts.listen)
        if ask.stream:
            return _Events(request, self._events(ask, texts, running), running)
        gone = asyncio.ensure_future(_until_gone(request))
        work = asyncio.ensure_future(self._whole(ask, texts, running))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await work) if work.done() else Response(status_code=_GONE)
        finally:
            gone.cancel()
            work.cancel()
            cancel(running)

    async def _whole(self, ask: Ask, texts: Texts, running: Any) -> dict[str, Any]:
        parts = [""] * len(running)
        async with self._in_time():
            async for index, text, _ in texts.pieces(running):
                parts[index] += text
        return Answer(ask).whole(texts.choices(parts))

    async def _events(self, ask: Ask, texts: Texts, running: Any) -> AsyncIterator[str]:
        """The events of a stream."""
        answer = Answer(ask)
        try:
            async with self._in_time():
                for index in range(len(running)):
                    if first := answer.first(index):
                        yield _event(first)
                async for index, text, reason in texts.pieces(running):
                    if text or not ask.chat:
                        yield _event(answer.piece(index, text, None if ask.chat else reason))
                    if ask.chat and reason is not None:
                        yield _event(answer.piece(index, "", reason))
                if ask.usage:
                    yield _event(answer.last(texts.choices([""] * len(running))))
        except HTTPError as error:  # the status was sent already
            yield _event(error.body())
        yield "data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError:
            raise HTTPError(504, f"no whole answer within {self.timeout:g} seconds; ask for fewer tokens") from None

    # --- models and adapters ---

    async def models(self, request: Request) -> Response:
        """`/v1/models`: the base and the adapters."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served.names()]})

    async def model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        name = request.path_params["name"]
        if name not in self.served.names():
            raise HTTPError(404, f"the model {name!r} does not exist", "model")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        base = self.served.base
        more = {"max_model_len": self.served.engine.capacity, "root": base, "parent": None if name == base else base}
        return {"id": name, "object": "model", "created": _CREATED, "owned_by": "jpeft", **more}

    async def load(self, request: Request) -> Response:
        """`/v1/load_lora_adapter`, as vLLM names it: of any method."""
        name, path = _texts(await _body(request), "lora_name", "lora_path")
        await run_in_threadpool(self.folder.load, self.served.engine, name, path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """`/v1/unload_lora_adapter`, as vLLM names it."""
        (name,) = _texts(await _body(request), "lora_name")
        await run_in_threadpool(self.folder.unload, self.served.engine, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    # --- the server itself ---

    async def health(self, request: Request) -> Response:
        """`/health`: 200 while requests are taken, then 503."""
        return Response(status_code=503 if self.served.engine.closed else 200)

    async def metrics(self, request: Request) -> Response:
        """`/metrics`, for Prometheus."""
        return Response(metrics.render(self.served.engine), media_type=metrics.CONTENT_TYPE)


class _Events(StreamingResponse):
    """A stream of events, whose requests are cancelled once it ends or the client has gone away."""

    def __init__(self, request: Request, events: AsyncIterator[str], running: Any):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._request, self._running = request, running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(_until_gone(self._request))
        work = asyncio.ensure_future(super().__call__(scope, receive, send))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            gone.cancel()
            work.cancel()
            cancel(self._running)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object in a body, of which no more is read than it may have."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        if (size := size + len(part)) > _MOST_BYTES:
            raise HTTPError(413, f"the body has more than {_MOST_BYTES >> 20} MiB")
    return read_json(b"".join(parts))


def _texts(body: dict[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(body.get(name), str):
            raise HTTPError(400, f"`{name}` must be a text, got {body.get(name)!r:.60}", name)
    return [body[name] for name in names]


async def _until_gone(request: Request) -> None:
    """Returns once the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _as_response(error: HTTPError) -> Response:
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


async def _not_served(request: Request, error: Exception) -> Response:
    """The answer to a path or a verb that there is not."""
    assert isinstance(error, HTTPException)
    return _as_response(HTTPError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def run(app: Starlette, host: str, port: int, drain: float = 30.0) -> None:
    """Serves an application until SIGINT or SIGTERM, then takes no more connections and finishes the answers.

    Args:
      app: the application.
      host: the address to listen at.
      port: the port.
      drain: the most seconds for the answers that are under way.

    >>> run(app, "127.0.0.1", 8000)  # doctest: +SKIP
    """
    import uvicorn

    seconds = max(1, round(drain))
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=seconds)
