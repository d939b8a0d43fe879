"""Engines with small pools, and what must hold of what they give out and leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from crosslayer.engine import Engine, EngineConfig, Output, Request, SamplingParams
from crosslayer.engine.batch import Batch, HostBatch, Shape
from crosslayer.engine.graphs import Computed, graph_shapes
from crosslayer.engine.runner import Runner
from crosslayer.engine.sampler import OnHost
from crosslayer.engine.transfer import pack, unpack
from crosslayer.model import Transformer
from crosslayer.model.paged import sequence_bytes
from tests.conftest import tiny_config
from tests.model.checks import random_model

MAX_LENGTH = 64


@cache
def model_of(plan: str, **changes: int) -> Transformer:
    return random_model(tiny_config(plan, **changes))


def small_engine(
    model: Transformer, sequences: float = 3.0, max_length: int = MAX_LENGTH, *, overlaps: bool = False, **config: int
) -> Engine:
    """An engine with room for so many sequences of `max_length` tokens; `overlaps`: in the order and the shapes of the
    steps of a GPU."""
    size = config.get("block_size", 4)
    nbytes = int(sequences * sequence_bytes(model.config, size, max_length, torch.float32))
    engine = Engine(
        model, config=EngineConfig(**{"block_size": 4, "max_length": max_length, "cache_bytes": nbytes, **config})
    )
    engine.runner.overlaps = overlaps
    if overlaps:
        shapes = graph_shapes(engine.runner.builder.filler_slot)
        engine.runner._graphs = {shape: Uncaptured(engine.runner, shape) for shape in shapes}  # type: ignore[misc]
    return engine


class Uncaptured:
    """In place of a CUDA graph: the same arrays, which must have the graph's shapes, but its launches one by one."""

    batch: Batch

    def __init__(self, runner: Runner, shape: Shape) -> None:
        self._runner, self._shape = runner, shape

    def __call__(self, host: HostBatch) -> Computed:
        assert self._shapes(host) == self._shapes(self._runner.builder.on_host([], self._shape))
        self.batch = self._runner.builder.on_device(host, unpack(pack(host.arrays, pinned=False), host.arrays))
        logits, tokens = self._runner.compute(self.batch)
        return Computed(logits, tokens, OnHost(tokens, None))

    @staticmethod
    def _shapes(host: HostBatch) -> tuple[Any, ...]:
        return (host.most_new, *((name, array.shape, array.dtype) for name, array in host.arrays.items()))


def run(engine: Engine, requests: Sequence[Request], arrivals: Sequence[int] = ()) -> dict[tuple[str, int], list[int]]:
    """Tokens of each sample, where request i arrives before step arrivals[i] (default: all at once)."""
    tokens: dict[tuple[str, int], list[int]] = {(r.id, i): [] for r in requests for i in range(r.params.n)}
    queue = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    step = 0
    while queue or engine.has_work:
        while queue and queue[0][0] <= step:
            engine.add(requests[queue.pop(0)[1]])
        collect(engine.step(), tokens)
        step += 1
        assert step < 10_000, "the engine makes no progress"
    return tokens


def collect(outputs: Sequence[Output], tokens: dict[tuple[str, int], list[int]]) -> None:
    for output in outputs:
        if output.token is not None:
            tokens[output.request_id, output.index].append(output.token)


def request(name: object, prompt: Sequence[int], max_tokens: int = 10, **params: object) -> Request:
    return Request(str(name), tuple(prompt), SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


@torch.no_grad()
def assert_greedy(model: Transformer, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Every token is the likeliest one after those before it, by the model without a cache.

    By induction that is the greedy continuation, token for token. The two best logits may only be mistaken for one
    another where they are closer than the differences between float32 runs of another batch.
    """
    logits = model(torch.tensor([[*prompt, *output]]))[0, len(prompt) - 1 : -1]
    taken = logits.gather(-1, torch.tensor(output)[:, None])[:, 0]
    gap = (logits.amax(dim=-1) - taken) / logits.abs().max()
    assert gap.max() < 2e-5, f"token {int(gap.argmax())} of {output} after {prompt} is {gap.max():.1e} below the best"


def assert_nothing_held(engine: Engine) -> None:
    """No request is in the engine, and every block is free."""
    assert not engine.has_work
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    check_accounts(engine)
    for pool in engine.blocks.pools.values():
        assert pool.num_free == len(pool.references)


def check_accounts(engine: Engine) -> None:
    """References are the numbers of tables that hold a block; blocks without any are free; names are one to one; so are
    slots. All tokens are known but at most one, which a step that was launched draws."""
    scheduler = engine.scheduler
    assert all(not sequence.tables and sequence.slot == -1 for sequence in scheduler.waiting)
    slots = [sequence.slot for sequence in scheduler.running]
    assert sorted(slots + scheduler._free_slots) == list(range(engine.config.max_running))
    drawing = [item.sequence for step, _ in engine._launched for item in step if item.draws]
    assert len(engine._launched) <= engine.runner.overlaps
    for sequence in (*scheduler.running, *scheduler.waiting):
        assert sequence.num_pending == drawing.count(sequence)
    for span, pool in engine.blocks.pools.items():
        held = [block for sequence in scheduler.running for block in sequence.tables[span].blocks]
        assert pool.references == [held.count(block) for block in range(len(pool.references))]
        assert set(pool._free) == {block for block, count in enumerate(pool.references) if not count}
        assert {block: name for name, block in pool._named.items()} == pool._names
    for sequence in scheduler.running:
        for span, table in sequence.tables.items():
            first = (
                max(0, sequence.num_cached - span + 1) // engine.blocks.block_size if span < engine.max_length else 0
            )
            assert table.first == first, "a block that no window reaches is still held"
            end = table.first + len(table.blocks)
            assert end * engine.blocks.block_size == sequence.room >= sequence.num_cached
