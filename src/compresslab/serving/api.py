"""OpenAI's API over one runtime: /v1/models, /v1/chat/completions, /v1/completions, and /health.

    body (read up to its limit) -> requests.read -> token ids -> Worker -> pieces -> one JSON answer, or server-sent events

A request has `timeout` seconds in all, from its first byte to its last. A client that goes away ends its generation.
Sources: OpenAI's API reference; server-sent events as in the HTML standard, "data: JSON" and a blank line.
Oracle: the pieces of a streamed answer together are the answer that is not streamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from compresslab.errors import CompressLabError
from compresslab.serving import requests
from compresslab.serving.generation import Piece, generate
from compresslab.serving.requests import ApiError, ChatRequest, CompletionRequest
from compresslab.serving.runtime import Runtime
from compresslab.serving.worker import Job, Stopped, Worker

DISCARD_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Attributes: max_tokens of one answer; queue, requests that wait while one runs; timeout in seconds; body in bytes."""

    max_tokens: int = 1024
    queue: int = 16
    timeout: float = 300
    body: int = 1_000_000


class Answering:
    """One accepted request: its job in the worker, and the pieces that came of it so far."""

    def __init__(self, service: Service, body: requests.Request, ids: list[int], deadline: float) -> None:
        self.service, self.body, self.prompt, self.deadline = service, body, len(ids), deadline
        self.is_chat = isinstance(body, ChatRequest)
        self.head = {
            "id": ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.name,
        }
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._pieces = pieces
        runtime = service.runtime
        sampling = body.sampling(min(service.limits.max_tokens, runtime.context_length - len(ids)))
        self.job = Job(
            lambda: generate(runtime, ids, sampling, body.stops()),
            lambda piece: None if loop.is_closed() else loop.call_soon_threadsafe(pieces.put_nowait, piece),
        )

    async def next(self) -> Piece:
        found = await self._pieces.get()
        if isinstance(found, Stopped):
            raise ApiError(503, "the server is going down", code="shutting_down")
        if isinstance(found, Exception):
            raise ApiError(500, f"the model failed: {type(found).__name__}: {found}", code="generation_failed")
        return found

    async def all(self) -> dict[str, Any]:
        """The whole answer."""
        parts = [await self.next()]
        while parts[-1].finish is None:
            parts.append(await self.next())
        text, last = "".join(part.text for part in parts), parts[-1]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self._usage(last)}

    async def events(self, first: Piece) -> AsyncIterator[str]:
        """The answer as it comes. What goes wrong on the way is an event too, for the status has been sent."""
        piece = first
        try:
            if self.is_chat:
                yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None)
            while True:
                if piece.text or piece.finish:
                    yield self._chunk(self._said(piece.text), piece.finish)
                if piece.finish:
                    break
                async with asyncio.timeout_at(self.deadline):
                    piece = await self.next()
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event({**self._chunk_head(), "choices": [], "usage": self._usage(piece)})
        except TimeoutError:
            yield _event(_timed_out(self.service.limits).body)
        except ApiError as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"

    def _said(self, text: str) -> dict[str, Any]:
        if not self.is_chat:
            return {"text": text}
        return {"delta": {"content": text} if text else {}}

    def _chunk(self, said: dict[str, Any], finish: str | None) -> str:
        return _event(
            {**self._chunk_head(), "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}
        )

    def _chunk_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.is_chat else "text_completion"}

    def _usage(self, last: Piece) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": last.tokens,
            "total_tokens": self.prompt + last.tokens,
        }


class Events(StreamingResponse):
    """Server-sent events of one answer; however they end, its job ends with them."""

    def __init__(self, answering: Answering, first: Piece) -> None:
        super().__init__(answering.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.service.worker.cancel(self.answering.job)


class Service:
    """A runtime, its worker, and the one way from a request to an answer."""

    def __init__(self, runtime: Runtime, name: str, limits: Limits) -> None:
        self.runtime, self.name, self.limits = runtime, name, limits
        self.worker = Worker(limits.queue)
        self.started = int(time.time())

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "compresslab"}

    async def answer(self, request: Request, kind: type[requests.Request]) -> Response:
        deadline = asyncio.get_running_loop().time() + self.limits.timeout
        try:
            async with asyncio.timeout_at(deadline):
                content = await self._read(request)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.timeout:g} s", code="timeout") from None
        body = requests.read(content, kind)
        answering = Answering(self, body, self._prompt(body), deadline)
        try:
            accepted = self.worker.submit(answering.job)
        except Stopped:
            raise ApiError(503, "the server is going down", code="shutting_down") from None
        if not accepted:
            raise ApiError(
                429, f"{self.limits.queue} requests wait already: try again later", code="queue_full",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        handed_on = False
        try:
            if not body.stream:
                return JSONResponse(await self._while_there(request, answering.all(), deadline))
            first = await self._while_there(request, answering.next(), deadline)
            handed_on = True
            return Events(answering, first)
        finally:
            if not handed_on:
                self.worker.cancel(answering.job)

    async def _read(self, request: Request) -> bytes:
        """The body, given up as soon as it is too long."""
        content = bytearray()
        parts = request.stream()
        async for part in parts:
            content += part
            if len(content) > self.limits.body:
                await _discard(parts)
                raise ApiError(
                    413, f"the body is longer than {self.limits.body} bytes", code="body_too_large",
                    headers={"Connection": "close"},
                )  # fmt: skip
        return bytes(content)

    def _prompt(self, body: requests.Request) -> list[int]:
        """Its token ids, of a length that leaves room for an answer."""
        where = "messages" if isinstance(body, ChatRequest) else "prompt"
        if body.model != self.name:
            raise ApiError(
                400, f"no model '{body.model}' here: there is '{self.name}'", param="model", code="model_not_found"
            )
        try:
            ids = self.runtime.encode(body.text())
        except CompressLabError as error:
            raise ApiError(400, str(error), param=where, code="invalid_value") from None
        if not ids:
            raise ApiError(400, "the prompt is empty", param=where, code="invalid_value")
        if len(ids) >= self.runtime.context_length:
            message = (
                f"the prompt has {len(ids)} tokens, and the model's context {self.runtime.context_length}: shorten it"
            )
            raise ApiError(400, message, param=where, code="context_length_exceeded")
        return ids

    async def _while_there(self, request: Request, work: Coroutine[Any, Any, Any], deadline: float) -> Any:
        """What `work` returns; ended when time is up or the client goes away."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        loop = asyncio.get_running_loop()
        working, watching = loop.create_task(work), loop.create_task(gone())
        try:
            await asyncio.wait({working, watching}, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if watching.done():
                raise ApiError(499, "the client has gone", code="client_closed_request")  # nobody reads it
            raise _timed_out(self.limits)
        finally:
            working.cancel()
            watching.cancel()


def make_app(service: Service) -> FastAPI:
    """The routes. Errors of every kind have the API's shape."""
    app = FastAPI(title="CompressLab", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = service.worker.counts()
        return {"status": "ok", "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name}")
    async def shown(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"no model '{name}' here: there is '{service.name}'", code="model_not_found")
        return service.model()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    return app


async def _discard(parts: AsyncIterator[bytes]) -> None:
    """What else is sent, for a moment: a connection closed on unread bytes is reset, and the answer lost with it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            async for _ in parts:
                pass


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _timed_out(limits: Limits) -> ApiError:
    return ApiError(504, f"no whole answer within {limits.timeout:g} s", code="timeout")
