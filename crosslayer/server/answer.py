"""From a generation to the bytes of an answer, one JSON object or server-sent events; without a client it ends."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from crosslayer.server.errors import ApiError
from crosslayer.server.responses import Choice, Format, Speller, Usage
from crosslayer.server.worker import Generation

T = TypeVar("T")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass
class Answer:
    """A generation and how to put it. `beginnings` has per prompt what the text of its samples begins with (echo)."""

    generation: Generation
    form: Format
    model: str
    speller: Speller
    prompt_tokens: int
    beginnings: list[str]
    samples: int
    logprobs: bool
    include_usage: bool
    _completion_tokens: int = field(default=0, init=False)
    _cached: dict[int, int] = field(default_factory=dict, init=False)  # by prompt

    def __post_init__(self) -> None:
        self._frame = {
            "id": f"{self.form.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.model,
        }
        self._choices = [Choice(self.speller, text) for text in self.beginnings for _ in range(self.samples)]

    async def whole(self, request: Request) -> Response:
        """All at once.

        Raises:
            ApiError: the engine failed, or the server is going down.
        """
        try:
            return await _while_connected(request.receive, self._collect()) or Response(status_code=499)
        finally:
            self.generation.close()

    async def _collect(self) -> Response:
        async for _ in self._changes():
            pass
        choices = [self.form.whole(index, choice, self.logprobs) for index, choice in enumerate(self._choices)]
        return JSONResponse({**self._frame, "object": self.form.name, "choices": choices, "usage": self._usage()})

    async def events(self) -> AsyncIterator[str]:
        """A chunk for each choice that has something new; then the usage, where it is asked for."""
        for index in range(len(self._choices)):
            if (begin := self.form.begin(index)) is not None:
                yield self._event([begin])
        try:
            async for changed in self._changes():
                pieces = [self.form.piece(index, self._choices[index], self.logprobs) for index in sorted(changed)]
                if pieces:
                    yield "".join(self._event([piece]) for piece in pieces)
        except ApiError as error:  # too late for a status
            yield f"data: {_encode(error.body())}\n\n"
            return
        if self.include_usage:
            yield self._event([], self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[Any], usage: Usage | None = None) -> str:
        chunk = {**self._frame, "object": self.form.chunk_name, "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        return f"data: {_encode(chunk)}\n\n"

    async def _changes(self) -> AsyncIterator[set[int]]:
        """The choices that have gained something."""
        async for batch in self.generation:
            changed = set()
            for prompt, output in batch:
                index = prompt * self.samples + output.index
                self._choices[index].add(output)
                self._completion_tokens += output.token is not None
                self._cached.setdefault(prompt, output.num_prefix)
                if output.text or output.logprobs or output.finish_reason:
                    changed.add(index)
            yield changed

    def _usage(self) -> Usage:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self.prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class EventStream(StreamingResponse):
    """An answer as server-sent events, for as long as there is somebody who listens."""

    def __init__(self, answer: Answer) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nor should a proxy wait for the whole
        super().__init__(answer.events(), media_type="text/event-stream", headers=headers)
        self._generation = answer.generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self.stream_response(send))
        except OSError:
            pass  # the connection is gone, and so is the reason to go on
        finally:
            self._generation.close()


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client went away, which cancels it."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()
