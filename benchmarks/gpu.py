"""What a card can do at all, and models whose weights are drawn on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from crosslayer.model import Transformer
from crosslayer.plan import ModelConfig

# A moment in a card's work.
Moment = Any


def moment(on_gpu: bool) -> Moment:
    """Now, in the order of what the card has been given to do; on a CPU, by its own clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: Moment, second: Moment) -> float:
    """Seconds from one to the other; waits until a card has come to both."""
    if isinstance(first, float):
        return float(second - first)
    second.synchronize()
    return float(first.elapsed_time(second) / 1e3)


def seconds(step: Callable[[], object], warm_up: int, timed: int) -> tuple[float, float]:
    """Mean seconds of a step, and those of the first, which compiles."""
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(warm_up - 1):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(timed):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / timed, first


def in_a_graph(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the step, which has been run once before."""
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def median_seconds(step: Callable[[], object], timed: int = 40) -> float:
    """Of single steps, each waited for: by the card's own clock, or a CPU's where there is none."""
    times, on_gpu = [], torch.cuda.is_available()
    for _ in range(3):
        step()
    for _ in range(timed):
        begin = moment(on_gpu)
        step()
        times.append(between(begin, moment(on_gpu)))
    return statistics.median(times)


def matmul_rate(size: int = 8192, repeats: int = 30) -> float:
    """FLOP/s of a bf16 matmul of random matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats, repeats)[0]


def copy_rate(numbers: int = 2**30, repeats: int = 20) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB from one place of the card's memory to another: by the
    driver or by a kernel, whichever is faster."""
    a, b = (torch.ones(numbers, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ways = (lambda: b.copy_(a), lambda: torch.neg(a, out=b))
    return 2 * a.nbytes / min(seconds(way, repeats, repeats)[0] for way in ways)


def random_model(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """A model with random weights drawn on its device, which is sooner done than as training draws them."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim < 2), std=config.initializer_range)
    return model
