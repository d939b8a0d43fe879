"""The times of the engine's steps, with a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.steps_of_a_run import run, table
from benchmarks.workloads import Workload
from crosslayer.engine import LLM, EngineConfig
from tests.engine.runs import model_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_and_all_time_are_there(device: str) -> None:
    model = model_of("cla2").to(device)
    llm = LLM(model, EngineConfig(max_length=40, max_running=8, max_step_tokens=24, prefix_caching=False))
    workload = Workload(3, 20, 5)
    seconds, rows = run(llm, workload, model.config.vocab_size, seed=0)
    # The last token of each is drawn, but goes through the model only where the next step was on its way already.
    assert sum(row["tokens"] for row in rows) >= 3 * (20 + 4)
    assert max(row["tokens"] for row in rows) == 24
    assert all(row["launch"] > 0 and row["card"] > 0 and row["host"] >= 0 for row in rows)
    assert sum(row["launch"] + row["host"] for row in rows) <= seconds * 1e3
    lines = table(rows).splitlines()
    prompts = [row for row in rows if row["tokens"] > row["sequences"]]
    assert len(lines) == 2 + len(prompts) + 1
    assert lines[-1].startswith(f"| {len(rows) - len(prompts)} |")
