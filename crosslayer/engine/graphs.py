"""Steps of fixed shapes as CUDA graphs.

A step is some hundred short kernels. A CPU cannot launch them as fast as a GPU runs them, unless there are many tokens.
A graph launches all at once, but always for the same shapes: so there is one for each of a few of them, and a step
takes the smallest that has room for it. What fills it up sees nothing and is not stored.

The first kernel of a graph fetches the step's batch from page-locked memory of the host, and the last one puts the
drawn tokens there: copies of so few bytes would keep the GPU waiting for longer than they take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crosslayer.engine.batch import Batch, BatchBuilder, HostBatch, Shape
from crosslayer.engine.sampler import OnHost
from crosslayer.engine.transfer import pack_into, packed_bytes, unpack

MemoryPool = Any  # what torch.cuda.graph_pool_handle() gives
# With more tokens, a GPU is busy for longer than a CPU needs to launch a step.
MIXED = (16, 32, 64, 128, 256, 384, 512, 768, 1024)


def graph_shapes(max_running: int) -> list[Shape]:
    """What there are graphs for: close together, so that little is computed for nothing."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_running, 32), max_running]
    one_each = [Shape(size, size) for size in sorted({size for size in sizes if size <= max_running})]
    # With one row, attention takes it that this has all the tokens.
    return one_each + [Shape(size, max(2, min(size // 2, max_running))) for size in MIXED]


class Exchange:
    """Page-locked memory through which all graphs get batches and give tokens back. There are two places for both, and
    a step takes the other ones than the step before: the host fills and reads these while the GPU is at that.

    `packed` is where a batch is on the device: one place for all graphs, of which one runs at a time.
    """

    def __init__(self, device: torch.device, most_bytes: int, most_tokens: int) -> None:
        self.packed = torch.zeros(most_bytes, dtype=torch.uint8, device=device)
        self.batches = torch.zeros(2, most_bytes, dtype=torch.uint8, pin_memory=True)
        self.tokens = torch.zeros(2, most_tokens, dtype=torch.int64, pin_memory=True)
        # Which are next: the device's own count, as its kernels cannot be told.
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._turn = 0
        self._done = (torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]

    def run(self, graph: torch.cuda.CUDAGraph, host: HostBatch) -> OnHost:
        """Replay a graph with a batch: where its tokens will be."""
        turn = self._turn
        self._done[turn].synchronize()  # it is, unless a step before was given up
        pack_into(self.batches[turn], host.arrays)
        graph.replay()
        self._turn = 1 - turn  # not before: where a launch fails, the device's count stays as well
        self._done[turn].record()
        return OnHost(self.tokens[turn], self._done[turn])


class Computed(NamedTuple):
    """What a graph computes, in buffers that the next step overwrites, the next but one where it is on the host. What
    fills up comes last."""

    logits: Tensor
    tokens: Tensor
    on_host: OnHost


class GraphedStep:
    """`compute(batch)`, logits and tokens, for steps of the shapes of `host`. Graphs that are captured on one `stream`
    share their `memory`."""

    def __init__(
        self,
        compute: Callable[[Batch], tuple[Tensor, Tensor]],
        builder: BatchBuilder,
        host: HostBatch,
        exchange: Exchange,
        memory: MemoryPool,
        stream: torch.cuda.Stream,
    ) -> None:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.exchange_triton import fetch, give

        packed = exchange.packed[: packed_bytes(host.arrays)]
        self.batch = builder.on_device(host, unpack(packed, host.arrays))
        self.exchange = exchange

        def step() -> tuple[Tensor, Tensor]:
            fetch(exchange.batches, exchange.turn, packed)
            logits, tokens = compute(self.batch)
            give(tokens, exchange.tokens, exchange.turn)
            return logits, tokens

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for batch in exchange.batches:
                pack_into(batch, host.arrays)
            # Compiles kernels, and lets libraries set up what a capture forbids; twice, so that turns are as before.
            for _ in exchange.batches:
                step()
        stream.synchronize()  # what it has fetched may be overwritten
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory, stream=stream):
            self._logits, self._tokens = step()

    def __call__(self, host: HostBatch) -> Computed:
        return Computed(self._logits, self._tokens, self.exchange.run(self.graph, host))


def capture(
    compute: Callable[[Batch], tuple[Tensor, Tensor]], builder: BatchBuilder, shapes: list[Shape]
) -> dict[Shape, GraphedStep]:
    """A graph for each shape, in their order. They are made the largest first: the others find room for what they
    compute in its memory."""
    described = {shape: builder.on_host([], shape) for shape in shapes}
    most_bytes = max((packed_bytes(host.arrays) for host in described.values()), default=0)
    exchange = Exchange(builder.cache.device, most_bytes, max((shape.rows for shape in shapes), default=0))
    memory = torch.cuda.graph_pool_handle()
    # Of the current device: PyTorch's own stream for captures stays on the device of the process's first one.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graphs = {
        shape: GraphedStep(compute, builder, described[shape], exchange, memory, stream)
        for shape in sorted(shapes, reverse=True)
    }
    return {shape: graphs[shape] for shape in shapes}
