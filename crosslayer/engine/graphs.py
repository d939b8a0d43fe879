"""Steps in which every sequence gains one token, as CUDA graphs.

Such a step is some hundred short kernels, which a CPU cannot launch as fast as the GPU runs them. A graph launches all
at once, but always for the same shapes: so there is one for each of a few numbers of rows, and a step takes the next
larger one, with rows that see nothing to fill it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crosslayer.engine.batch import Batch, BatchBuilder, HostBatch
from crosslayer.engine.transfer import pack, unpack

Computed = tuple[Tensor, ...]
MemoryPool = Any  # what torch.cuda.graph_pool_handle() gives


def graph_sizes(max_running: int) -> list[int]:
    """Numbers of rows that there are graphs for: close together, so that little is computed for nothing."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_running, 32), max_running]
    return sorted({size for size in sizes if size <= max_running})


class GraphedStep:
    """`compute(batch)` for steps of `num_rows` rows. Graphs of the same `memory` share it."""

    def __init__(
        self, compute: Callable[[Batch], Computed], builder: BatchBuilder, num_rows: int, memory: MemoryPool
    ) -> None:
        host = builder.on_host([], num_rows)
        self._packed = pack(host.arrays, pinned=False).to(builder.cache.device)
        self.batch = builder.on_device(host, unpack(self._packed, host.arrays))
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute(self.batch)  # compiles kernels, and lets libraries set up what a capture forbids
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory):
            self._computed = compute(self.batch)

    def __call__(self, host: HostBatch) -> Computed:
        """What the graph computes, in buffers that the next step overwrites; rows that fill up come last."""
        self._packed.copy_(pack(host.arrays, pinned=True), non_blocking=True)
        self.graph.replay()
        return self._computed
