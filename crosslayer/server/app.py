"""The HTTP service: its routes, who may use them, and what is checked before a request reaches the engine."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from crosslayer.data import Tokenizer
from crosslayer.engine import Engine, SamplingParams
from crosslayer.errors import UserError
from crosslayer.server.answer import Answer, EventStream
from crosslayer.server.chat import ChatTemplate
from crosslayer.server.errors import ApiError, going_down
from crosslayer.server.metrics import Metrics
from crosslayer.server.openapi import describe_api
from crosslayer.server.protocol import ChatRequest, CompletionRequest, describe
from crosslayer.server.responses import ChatFormat, CompletionFormat, Format, Model, Speller
from crosslayer.server.worker import Worker

MAX_BODY = 8 * 2**20  # bytes; a million tokens as text or as numbers

Body = TypeVar("Body", bound=BaseModel)


class Service:
    """One model behind HTTP. `template` is None where the folder has none: then there is no chat.

    `max_queue`: samples that may wait beyond those that the engine runs at a time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        name: str,
        api_key: str | None = None,
        max_queue: int = 1024,
    ) -> None:
        self.name, self.tokenizer, self.template = name, tokenizer, template
        self.speller = Speller(tokenizer)
        self.metrics = Metrics(engine)
        self.worker = Worker(engine, self.metrics, max_queue)
        self._created = int(time.time())
        api = [
            Route("/completions", self._completions, methods=["POST"]),
            Route("/chat/completions", self._chat, methods=["POST"]),
            Route("/models", self._models),
            Route("/models/{model:path}", self._model),
        ]
        description = describe_api(name, with_key=api_key is not None)
        page = Path(__file__).with_name("page.html").read_text("utf-8")

        async def openapi(_: Request) -> Response:
            return JSONResponse(description)

        async def front(_: Request) -> Response:
            return HTMLResponse(page)

        self.app = Starlette(
            routes=[
                Mount("/v1", routes=api, middleware=[Middleware(_KeyCheck, key=api_key)] if api_key else None),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/openapi.json", openapi),
                Route("/", front),
            ],
            exception_handlers={
                ApiError: _api_error,
                UserError: _user_error,
                HTTPException: _http_error,
                ClientDisconnect: _client_gone,
                Exception: _internal_error,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await self.worker.stop()

    # -- generation --------------------------------------------------------------------------------------------

    async def _completions(self, request: Request) -> Response:
        body = await _read(request, CompletionRequest)
        self._check(body.model, len(body.prompts), body.n)
        params = body.sampling()
        # In a thread: a long text takes a while, in which the others' tokens must go out.
        prompts = await asyncio.to_thread(self._encode, body.prompts)
        return await self._answer(request, body, CompletionFormat, prompts, params, echo=body.echo)

    async def _chat(self, request: Request) -> Response:
        body = await _read(request, ChatRequest)
        self._check(body.model, 1, body.n)
        if self.template is None:
            raise ApiError(400, f"{self.name} has no chat template; it continues texts, at /v1/completions")
        params = body.sampling(self.template.stop_token_ids)
        prompt = await asyncio.to_thread(self.template.encode, body.plain_messages())
        return await self._answer(request, body, ChatFormat, [prompt], params)

    def _check(self, model: str, prompts: int, samples: int) -> None:
        if model != self.name:
            raise _no_such_model(model, self.name)
        if not prompts:
            raise ApiError(400, "prompt: there is none in the list", param="prompt")
        if prompts * samples > self.worker.capacity:
            raise ApiError(400, f"{prompts * samples} samples in one request; this server takes {self.worker.capacity}")

    def _encode(self, prompts: list[str] | list[list[int]]) -> list[list[int]]:
        # All are texts or none is. A batch, even of one, because encoding one lets no other thread run meanwhile.
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        return self.tokenizer.encode_batch(texts) + [prompt for prompt in prompts if not isinstance(prompt, str)]

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        form: Format,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        echo: bool = False,
    ) -> Response:
        generation = self.worker.submit(prompts, params)  # which also finds out whether all of their tokens exist
        answer = Answer(
            generation,
            form,
            self.name,
            self.speller,
            prompt_tokens=sum(map(len, prompts)),
            beginnings=[self.tokenizer.decode(prompt) if echo else "" for prompt in prompts],
            samples=params.n,
            logprobs=params.logprobs is not None,
            include_usage=body.include_usage,
        )
        return EventStream(answer) if body.stream else await answer.whole(request)

    # -- everything else ---------------------------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self.name:
            raise _no_such_model(request.path_params["model"], self.name)
        return JSONResponse(self._description())

    def _description(self) -> Model:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "crosslayer"}

    async def _health(self, _: Request) -> Response:
        healthy = self.worker.healthy
        return PlainTextResponse("ok\n" if healthy else "steps of the engine fail\n", 200 if healthy else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _read(request: Request, form: type[Body]) -> Body:
    """The body as `form`.

    Raises:
        ApiError: it is too large, not JSON, or not of that form, or it does not come before the server goes down.
    """
    # A page in a browser can send other types to a server on this machine without asking; this one it cannot.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY:
                raise ApiError(413, f"the body has more than {MAX_BODY:,} bytes")
    except asyncio.CancelledError:  # by uvicorn, when it has waited long enough
        raise going_down() from None
    try:
        return form.model_validate_json(bytes(content))
    except ValidationError as error:
        message, field = describe(error)
        raise ApiError(400, message, param=field) from None


class _KeyCheck:
    """Lets through who has the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if not secrets.compare_digest(kind.lower() + b" " + key.strip(), self._wanted):
            raise ApiError(401, "want the server's key: Authorization: Bearer KEY", code="invalid_api_key")
        await self._app(scope, receive, send)


def _no_such_model(wrong: str, right: str) -> ApiError:
    return ApiError(404, f"there is no model {wrong!r} here; this is {right!r}", param="model", code="model_not_found")


# Async, or each would take a thread, and time that a server that goes down has not.
async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _user_error(_: Request, error: Exception) -> Response:
    return ApiError(400, str(error)).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail.lower()}").response()
    response.headers.update(error.headers or {})
    return response


async def _client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody will read


async def _internal_error(_: Request, error: Exception) -> Response:
    return ApiError(500, "an error inside the server; its log says which").response()
