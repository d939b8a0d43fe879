"""What sharing buys, measured with a tiny model on a CPU, and its plot."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.load import arrivals
from benchmarks.sharing_report import Point, draw, table
from benchmarks.what_sharing_buys import MIXES, VARIANTS, Busy, Mix, Settings, measure
from crosslayer.engine import Engine, EngineConfig
from crosslayer.model.paged import sequence_bytes
from tests.conftest import tiny_config
from tests.engine.runs import model_of

MIX = Mix("short", "9:13", "3:6", 19, counted=0.2)


def test_the_mixes_lengths_are_within_their_bounds() -> None:
    for mix in MIXES:
        rng = random.Random(1)
        lengths = [mix.draw(rng) for _ in range(2000)]
        assert max(sum(pair) for pair in lengths) <= mix.max_length
        low, _, high = mix.answer.partition(":")
        assert mix.mean_answer == pytest.approx((int(low) + int(high or low)) / 2, rel=0.01)


def test_arrivals() -> None:
    assert list(arrivals(4, 1, random.Random(0), poisson=False)) == [0, 0.25, 0.5, 0.75]
    due = list(arrivals(50, 40, random.Random(0)))
    assert sorted(due) == due
    assert 0 == due[0] < due[-1] < 40
    assert len(due) == pytest.approx(2000, abs=150)  # 3 standard deviations are 134


def test_a_pool_is_filled_with_sequences_that_cost_nothing() -> None:
    model = model_of("cla2")
    mix = Mix("long answers", "9:13", "20:30", 43, counted=0.2)  # so that few end in the same step
    room = 8 * sequence_bytes(model.config, 2, mix.max_length, torch.float32)
    settings = EngineConfig(
        cache_bytes=room, block_size=2, max_length=mix.max_length, max_step_tokens=64, prefix_caching=False
    )
    engine = Engine(model, config=settings)
    busy = Busy(engine, mix, model.config.vocab_size)
    busy.fill()
    assert not engine.scheduler.waiting
    running = list(engine.scheduler.running)
    assert len(running) >= 12
    assert all(sequence.num_prefix == len(sequence.request.prompt) - 1 for sequence in running)
    while not (later := [sequence for sequence in engine.scheduler.running if sequence not in running]):
        busy.saturated(0.01)
    assert all(sequence.num_prefix == 0 for sequence in later)
    assert engine.cache_bytes_used > 0.8 * engine.runner.cache.nbytes
    busy.stop()
    assert not engine.has_work
    assert engine.cache_bytes_used == 0


@pytest.fixture(scope="module")
def points() -> list[Point]:
    found: list[Point] = []
    settings = Settings(
        tiny_config("identity"),
        pools=(2**15, 2**16),
        loaded=2**15,
        mixes=(MIX,),
        shares=(0.5, 2.0),
        settle=0.05,
        load=0.4,
        max_running=64,
        device="cpu",
    )
    first = next(measure(settings, found))
    assert found == [first]
    assert len(list(measure(settings, found))) == 7  # the rest
    return found


def test_points(points: list[Point]) -> None:
    by_key = {(p["design"], p["cache_dtype"], p["pool"]): p for p in points}
    assert len(by_key) == len(points) == 8
    for point in points:
        assert point["tokens_per_second"] > 0
        # As many tokens as the requests that end have: each of them 3 to 6.
        assert point["tokens_per_second"] == pytest.approx(4.5 * point["ended_per_second"], rel=0.5)
        assert point["begun_per_second"] == pytest.approx(point["ended_per_second"], rel=0.5)
        assert [load["rate"] > 0 for load in point["load"]] == [True] * 2 * (point["pool"] == 2**15)
    small = {key[:2]: p for key, p in by_key.items() if key[2] == 2**15}
    unshared, shared = small["MQA", "auto"], small["MQA-CLA2", "auto"]
    assert shared["cache_tokens"] == pytest.approx(2 * unshared["cache_tokens"], rel=0.1)
    assert shared["running"] > 1.5 * unshared["running"]
    assert [load["rate"] for load in shared["load"]] == [load["rate"] for load in unshared["load"]]


def test_table_and_plot(points: list[Point]) -> None:
    assert len(table(points).splitlines()) == 2 + 8
    figure = draw(points)
    left, right = figure.axes
    assert [bars.get_label() for bars in left.containers] == [
        "MQA, bf16",
        "MQA-CLA2, bf16",
        "MQA, fp8",
        "MQA-CLA2, fp8",
    ]
    for bars, key in zip(left.containers, VARIANTS, strict=True):
        rates = [p["tokens_per_second"] for p in points if (p["design"], p["cache_dtype"]) == key]
        assert [bar.get_height() for bar in bars] == rates
    loads = [load for point in points for load in point["load"] if load["ttft_ms"]]
    dots = [line for line in right.lines if line.get_marker() == "o"]
    assert [dot.get_ydata()[0] for dot in dots] == [load["ttft_ms"]["p50"] / 1000 for load in loads]
    figure.canvas.draw()


def test_a_plot_of_what_there_is_so_far(points: list[Point]) -> None:
    without = [{**point, "load": [{"rate": 1.0, "requests": 0, "waiting": 0, "ttft_ms": {}}]} for point in points[:1]]
    figure = draw(without)
    assert not figure.axes[1].lines or not any(len(line.get_xdata()) for line in figure.axes[1].lines)
