"""A micro batch's forward and backward pass as one CUDA graph.

A small model's kernels are done sooner than the CPU can launch the next ones; a graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WARM_UP = 2


class GraphedLoss:
    """`loss(inputs, targets)` with its backward pass, captured when first called and replayed from then on.

    Inputs and targets must have the shapes of the first call. The gradients live in fixed buffers: a call overwrites
    them, or adds to them with `accumulate`, so the caller neither zeroes nor drops them.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, inputs: Tensor, targets: Tensor, *, accumulate: bool) -> Tensor:
        """The loss, in a buffer that the next call overwrites."""
        if not self._graphs:
            self._inputs, self._targets = inputs.clone(), targets.clone()
            self._warm_up()
        self._inputs.copy_(inputs, non_blocking=True)
        self._targets.copy_(targets, non_blocking=True)
        if accumulate not in self._graphs:
            self._graphs[accumulate] = self._capture()
        graph, loss = self._graphs[accumulate]
        graph.replay()
        return loss

    def _run(self) -> Tensor:
        loss = self._loss(self._inputs, self._targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _warm_up(self) -> None:
        """Compile, and let libraries set up what they may not set up during a capture."""
        # Of the current device: PyTorch's own stream for captures stays on the device of the process's first one.
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UP):
                self._run()
                self._drop_gradients()
        torch.cuda.current_stream().wait_stream(self._side)
        torch.cuda.empty_cache()  # a graph has memory of its own

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Where there are no gradients yet, the graph makes their buffers; else it adds to them."""
        graph = torch.cuda.CUDAGraph()
        pool = next((graph.pool() for graph, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self._side):
            loss = self._run()
        return graph, loss

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
