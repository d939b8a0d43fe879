"""The engines' runners with tiny models on a CPU, and the table of what they measured."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import transformers_rows
from benchmarks.serve_speed import capacity_row, compare, our_rows, run_apart, table
from benchmarks.workloads import Workload
from tests.conftest import tiny_config

WORKLOADS = [Workload(1, 5, 4), Workload(3, 7, 2)]


@pytest.mark.parametrize("rows", [our_rows, transformers_rows])
def test_a_row_for_each_workload(rows: object) -> None:
    config = tiny_config("identity", head_dim=8)
    measured = list(rows(config, WORKLOADS, "cpu"))  # type: ignore[operator]
    assert [Workload(**row["workload"]) for row in measured] == WORKLOADS
    for row, workload in zip(measured, WORKLOADS, strict=True):
        median = sorted(row["seconds"])[1]
        assert row["tokens_per_second"] == pytest.approx(workload.requests * workload.new_tokens / median)


def test_our_engine_runs_shared_designs() -> None:
    assert len(list(our_rows(tiny_config("cla2"), WORKLOADS, "cpu"))) == 2


def test_half_the_slots_hold_twice_the_tokens() -> None:
    sizes = (2**16, 2**20)
    tokens = [capacity_row(tiny_config(plan), "cpu", sizes)["cache_tokens"] for plan in ("identity", "cla2")]
    assert tokens[1] / tokens[0] == pytest.approx(2, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would not fail")
def test_an_engine_that_fails_costs_its_own_rows_only() -> None:
    assert run_apart("ours", "H128-MQA", None) == ([], "exit status 1")


def test_rates_are_compared_with_the_limit_and_with_ours() -> None:
    environment = {"gpu": "a card", "torch": "2.11", "time": "now"}
    one, many = {"requests": 1, "prompt_tokens": 512, "new_tokens": 512}, Workload(64, 512, 128)

    def run(failed: str | None, *rows: dict[str, object]) -> dict[str, object]:
        ceilings = {"bytes_per_second": 2.98e12, "flops": 772e12}
        return {"environment": environment, "ceilings": ceilings, "rows": list(rows), "failed": failed}

    runs = {
        "ours, H128-MQA": run(
            None,
            {"who": "crosslayer", "design": "H128-MQA", "workload": one, "tokens_per_second": 1200.0},
            {"who": "crosslayer", "design": "H128-MQA-CLA2", "workload": one, "tokens_per_second": 1300.0},
            {
                "who": "crosslayer",
                "design": "H128-MQA",
                "cache_bytes": 2**34,
                "cache_tokens": 1_677_712,
                "allocated_bytes_per_token": 10240.0,
            },
        ),
        "vllm, H128-MQA": run(
            "not done after 240 s",
            {"who": "vLLM", "design": "H128-MQA", "workload": vars(many), "tokens_per_second": 23_000.0},
            {"who": "vLLM", "design": "H128-MQA", "workload": one, "tokens_per_second": 600.0},
        ),
    }
    compared = compare(runs)
    assert [(row["who"], row["times"]) for row in compared] == [
        ("crosslayer", 1.0),
        ("crosslayer", 1.0),
        ("vLLM", 2.0),
        ("vLLM", None),
    ]
    assert compared[2]["share"] == pytest.approx(600 / 1560, rel=0.01)
    # 46 thousand were estimated with the output layer and all of the last layer at every token of a prompt.
    assert compared[3]["share"] == pytest.approx(23 / 48.8, rel=0.005)
    lines = table(runs).splitlines()
    assert "vllm, H128-MQA: a card, torch 2.11, now; 2.98 TB/s, 772 TFLOP/s; not done after 240 s" in lines
    assert "| 1 x (512 in, 512 out) | vLLM | H128-MQA | 600 | 39% of 1,554 | 2.00 times as fast |" in lines
    assert "| crosslayer | H128-MQA | 16 GiB | 1,677,712 | 10,240 |" in lines
