"""Steps of a tiny model on a CPU, whole and without attention, and their table."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_steps import least_microseconds, measure, runner_of, step_of, table
from benchmarks.workloads import Ceilings
from crosslayer.plan import parse_design, preset
from crosslayer.plan.cost import num_parameters
from tests.conftest import tiny_config


def test_every_sequence_sees_its_own_tokens_and_stores_one() -> None:
    runner = runner_of(tiny_config("cla2"), 3, 37, "cpu")
    for pool in (*runner.cache.keys.values(), *runner.cache.values.values()):
        pool.zero_()
    step_of(runner, 3, 37)()
    size, needed = runner.cache.block_size, -(-37 // runner.cache.block_size)
    for pool in runner.cache.keys.values():
        stored = pool.flatten(0, 1).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert stored == [(needed * (row + 1) - 1) * size + 36 % size for row in range(3)]


def test_a_row_for_each_step() -> None:
    rows = list(measure("cla2", tiny_config("cla2"), (1, 3), 20, ("attention",), "cpu"))
    assert [(row["rows"], row["without"]) for row in rows] == [(1, None), (1, "attention"), (3, None), (3, "attention")]
    assert all(row["microseconds"] > 0 for row in rows)


def test_the_least_time_of_a_step_and_the_table() -> None:
    """By hand: weights and cache at the rate of a copy, as long as there are few sequences."""
    ceilings, config = Ceilings(3e12, 1e18), parse_design("H128-MQA", preset("paper-1b"))
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    weights = num_parameters(config) - config.vocab_size * config.hidden_size - norms
    least = (2 * weights + 64 * 640 * 512 * config.num_hidden_layers) / 3e12 * 1e6
    assert least_microseconds(config, 64, 640, ceilings) == pytest.approx(least, rel=1e-3)
    rows = [{"design": "H128-MQA", "rows": 64, "length": 640, "microseconds": 2 * least}]
    rows = [{**rows[0], "without": None}, {**rows[0], "without": "attention", "microseconds": least}]
    last = table(rows, ceilings).splitlines()[-1]
    assert last == f"| H128-MQA | 64 | {2 * least:,.0f} | {least:,.0f} | 50% | {least:,.0f} |"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("part", ["attention", "fused products", "reading ahead"])
def test_parts_can_be_left_out_of_a_graph(part: str) -> None:
    (whole, less) = measure("cla2", tiny_config("cla2"), (8,), 20, (part,), "cuda")
    assert (whole["without"], less["without"]) == (None, part)
