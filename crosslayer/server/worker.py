"""The engine in a thread of its own, and the event loop's side of it.

Requests and aborts go in through a queue, which the thread empties between two steps. What a step gives out comes back
to the event loop in one call, which hands it to the generations that wait for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from queue import SimpleQueue

from crosslayer.engine import Engine, Output, Request, SamplingParams
from crosslayer.server.errors import ApiError, going_down
from crosslayer.server.metrics import Metrics

log = logging.getLogger("crosslayer.server")


class Generation:
    """What becomes of some prompts: iterate over it, and close it whatever happens."""

    def __init__(self, worker: Worker, ids: list[str], num_samples: int) -> None:
        self._worker, self.ids = worker, ids
        self._num_open = num_samples
        self._batch: list[tuple[int, Output]] = []
        self._error: ApiError | None = None
        self._ready = asyncio.Event()
        self.last_seen: dict[tuple[int, int], float] = {}  # when a sample last gained a token
        self.started = time.monotonic()

    def put(self, prompt: int, output: Output) -> None:
        self._batch.append((prompt, output))
        self._ready.set()

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """All that is new, as pairs of the number of a prompt and an output of one of its samples, until all samples
        have ended.

        Raises:
            ApiError: nothing more will come.
        """
        while self._num_open:
            await self._ready.wait()
            self._ready.clear()
            if self._error is not None:
                raise self._error
            batch, self._batch = self._batch, []
            self._num_open -= sum(output.finish_reason is not None for _, output in batch)
            yield batch

    def close(self) -> None:
        """End what has not ended: its blocks are free before the next step."""
        if self._num_open and self._error is None:
            self._worker.abort(self.ids)


class Worker:
    """Owns the engine. All methods but `_run` and what it calls are the event loop's.

    `max_queue`: samples that may be here beyond the `max_running` that are computed at a time.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.config.max_running + max_queue
        self.num_samples = 0  # here: queued, running, or aborted and not yet out of the engine
        self._last_step_failed = self._going_down = False
        # A request to add, the id of one to abort, or None to end the thread.
        self._inbox: SimpleQueue[Request | str | None] = SimpleQueue()
        self._generations: dict[str, tuple[Generation, int]] = {}  # and the number of the prompt in it, by request
        self._samples: dict[str, int] = {}  # those that have not ended, by request
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._last_step_failed

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Drop what is still here, and end the thread."""
        self.drop_all()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """Queue prompts (token ids), all of them or none.

        Raises:
            UserError: the engine could not serve one of them even alone.
            ApiError: the queue is full, or the server is going down.
        """
        if self._going_down:
            raise going_down()
        requests = [Request(str(next(self._numbers)), tuple(prompt), params) for prompt in prompts]
        for request in requests:
            self.engine.check(request)
        count = params.n * len(requests)
        if self.num_samples + count > self.capacity:
            self.metrics.refused.inc()
            raise ApiError(429, "the queue is full; try again in a moment", code="queue_full")
        self.num_samples += count
        generation = Generation(self, [request.id for request in requests], count)
        for number, request in enumerate(requests):
            self._generations[request.id] = generation, number
            self._samples[request.id] = params.n
            self._inbox.put(request)
            self.metrics.prompt_tokens.inc(len(request.prompt))
        return generation

    def abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            self._inbox.put(request_id)

    def drop_all(self) -> None:
        """Give up what is here and what comes, because the server is going down."""
        self._going_down = True
        for generation, _ in self._generations.values():
            generation.fail(going_down())
        self.abort(list(self._generations))

    def _deliver(self, outputs: list[Output], lost: set[str], failed: bool) -> None:
        """Hand on what a step gave out, and tell those whose requests it has `lost`."""
        now = time.monotonic()
        self._last_step_failed = failed
        for output in outputs:
            generation, prompt = self._generations[output.request_id]
            if output.token is not None:
                key = prompt, output.index
                self.metrics.token(now, generation.started, generation.last_seen.get(key))
                generation.last_seen[key] = now
            if output.finish_reason is not None:
                self.metrics.finished.labels(output.finish_reason).inc()
                self._forget(output.request_id, 1)
            generation.put(prompt, output)
        for request_id in lost:
            generation, _ = self._generations[request_id]
            self.metrics.finished.labels("error").inc(self._samples[request_id])
            self._forget(request_id, self._samples[request_id])
            generation.fail(
                ApiError(500, "the engine failed in this request; the server's log says why", code="engine")
            )
            self.abort(generation.ids)  # its other prompts have nobody who waits for them

    def _forget(self, request_id: str, samples: int) -> None:
        self.num_samples -= samples
        self._samples[request_id] -= samples
        if not self._samples[request_id]:
            del self._samples[request_id], self._generations[request_id]

    # -- the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        ended = False
        while not ended:
            outputs: list[Output] = []
            while not ended and (not self._inbox.empty() or not (self.engine.has_work or outputs)):
                message = self._inbox.get()
                if message is None:
                    ended = True
                elif isinstance(message, Request):
                    self.engine.add(message)
                else:
                    outputs += self.engine.abort(message)
            lost: set[str] = set()
            failed = False
            before = self.engine.request_ids
            try:
                outputs += self.engine.step()
            except Exception:
                log.exception("a step of the engine failed")
                failed = True
                lost = (before - self.engine.request_ids) or before  # if no step could even begin, none ever will
                for request_id in lost:
                    self.engine.abort(request_id)
            self._loop.call_soon_threadsafe(self._deliver, outputs, lost, failed)
