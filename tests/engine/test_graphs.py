"""Which steps are graphs, and how a graph's batch comes and its tokens go."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from crosslayer.engine import EngineConfig
from crosslayer.engine.batch import HostBatch, Shape
from crosslayer.engine.graphs import MIXED, Exchange, graph_shapes
from crosslayer.engine.request import Request, Sequence
from crosslayer.engine.runner import Runner
from crosslayer.engine.scheduler import Scheduled
from tests.conftest import tiny_config
from tests.model.checks import random_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def step(*items: tuple[int, bool]) -> list[Scheduled]:
    sequence = Sequence(Request("", (0,)), 0, 0, 9, frozenset(), None, [0])
    return [Scheduled(sequence, new, draws) for new, draws in items]


def test_a_step_takes_the_smallest_graph_that_has_room() -> None:
    runner = Runner(random_model(tiny_config("cla2")), EngineConfig(max_running=48), 64, torch.device("cpu"))

    def shape_of(*items: tuple[int, bool]) -> Shape | None:
        return runner._graphed_shape(step(*items), sum(draws for _, draws in items))

    assert shape_of((1, True)) is None
    runner._graphs = dict.fromkeys(graph_shapes(48))  # type: ignore[arg-type]
    assert shape_of((1, True)) == (1, 1)
    assert shape_of(*[(1, True)] * 3) == (4, 4)
    assert shape_of(*[(1, True)] * 41) == (48, 48)
    assert shape_of((1, False)) == (16, 8)
    assert shape_of((15, True), (1, True)) == (16, 8)
    assert shape_of((16, True), (1, True)) == (32, 16)
    assert shape_of(*[(1, True)] * 7, (9, True)) == (16, 8)
    assert shape_of(*[(1, True)] * 8, (2, True)) == (32, 16)
    assert shape_of(*[(1, True)] * 47, (200, False)) == (256, 48)
    assert shape_of((1024, True)) == (1024, 48)
    assert shape_of((1025, True)) is None


@pytest.mark.parametrize("max_running", [1, 2, 7, 64, 512, 1000])
def test_there_is_a_graph_for_every_step_of_single_tokens(max_running: int) -> None:
    shapes = graph_shapes(max_running)
    assert len(set(shapes)) == len(shapes)
    assert max(shape.rows for shape in shapes if shape.is_one_each) == max_running
    mixed = [shape for shape in shapes if not shape.is_one_each]
    assert [shape.tokens for shape in mixed] == list(MIXED)
    assert all(2 <= shape.rows < shape.tokens for shape in mixed)


def test_a_launch_that_fails_takes_no_turn() -> None:
    """Else the device, which has not counted it, would read old batches from then on."""
    exchange = Exchange.__new__(Exchange)  # without the page-locked memory that takes a GPU
    exchange.batches, exchange.tokens = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64)
    exchange._turn, exchange._done = 0, (Mock(), Mock())
    graph = Mock()
    device = 0  # whose turn it is there

    def replay() -> None:
        nonlocal device
        exchange.tokens[device] = 2 * exchange.batches[device].view(torch.int64)
        device = 1 - device

    for number in range(6):
        sent = HostBatch({"ids": torch.tensor([number]).numpy()}, 1)
        graph.replay.side_effect = RuntimeError("out of memory")
        with pytest.raises(RuntimeError):
            exchange.run(graph, sent)
        graph.replay.side_effect = replay
        assert exchange.run(graph, sent).tokens.tolist() == [2 * number]


@needs_cuda
def test_batches_and_tokens_change_places() -> None:
    from crosslayer.kernels.exchange_triton import fetch, give

    exchange = Exchange(torch.device("cuda"), 48, 2)
    ids = torch.zeros(2, dtype=torch.int64, device="cuda")

    def double() -> None:
        fetch(exchange.batches, exchange.turn, ids.view(torch.uint8))
        give(ids * 2, exchange.tokens, exchange.turn)

    for _ in range(2):
        double()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double()
    before = None
    for number in range(7):
        sent = HostBatch({"ids": torch.tensor([number, 100 + number]).numpy()}, 1)
        now = exchange.run(graph, sent)
        if before is not None:  # still there while the next step is under way
            assert before.event is not None
            before.event.synchronize()
            assert before.tokens.tolist() == [2 * (number - 1), 200 + 2 * (number - 1)]
        before = now
