"""Where the time of a run goes on one GPU: every step of the engine by the host's clock and by the card's.

    python -m benchmarks.steps_of_a_run --out results.json

Some workloads on the paper's 1B shape with random weights in bf16, each once after a run that does not count. Of a
step: its tokens and sequences; what the host took to launch it and for everything else since the step before; how long
the card worked on it; and how long it had idled before. A step that the host launches for longer than the card works
on it is one that the host limits.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import Moment, between, moment, random_model
from benchmarks.workloads import Workload
from crosslayer.engine import LLM, EngineConfig, SamplingParams
from crosslayer.engine.sampler import Draws
from crosslayer.engine.scheduler import Scheduled
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.plan import parse_design, preset

WORKLOADS = (Workload(1, 512, 64), Workload(64, 512, 64), Workload(512, 512, 32))

Row = dict[str, float]


def run(llm: LLM, workload: Workload, vocab_size: int, seed: int) -> tuple[float, list[Row]]:
    """Seconds of the run, and its steps; all times in milliseconds."""
    runner = llm.engine.runner
    on_gpu = runner.device.type == "cuda"
    launch: Callable[[Sequence[Scheduled]], Draws] = runner.launch
    steps: list[tuple[int, int, float, float, Moment, Moment]] = []

    def timed(step: Sequence[Scheduled]) -> Draws:
        first, called = moment(on_gpu), time.perf_counter()
        draws = launch(step)
        done = time.perf_counter()
        steps.append((sum(item.new for item in step), len(step), called, done, first, moment(on_gpu)))
        return draws

    params = SamplingParams(max_tokens=workload.new_tokens, ignore_eos=True)
    prompts = workload.prompts(vocab_size, seed)
    started = time.perf_counter()
    with patch.object(runner, "launch", timed):
        llm.generate(prompts, params)
    spent = time.perf_counter() - started
    rows, before = [], None
    for tokens, sequences, called, done, first, last in steps:
        row: Row = {"tokens": tokens, "sequences": sequences, "launch": (done - called) * 1e3}
        row["host"] = (called - (before[0] if before else started)) * 1e3
        row["card"] = between(first, last) * 1e3
        row["idle"] = between(before[1], first) * 1e3 if before else 0.0
        rows.append(row)
        before = (done, last)
    return spent, rows


def table(rows: Sequence[Row]) -> str:
    """As Markdown: each step with prompts, and all others together."""
    lines = ["| steps | tokens | sequences | launch, ms | host besides | card | idle before |", "|---|" + "---:|" * 6]
    with_prompts = [row for row in rows if row["tokens"] > row["sequences"]]
    others = [row for row in rows if row["tokens"] == row["sequences"]]
    for row in with_prompts:
        lines.append(_line("1", [row]))
    if others:
        lines.append(_line(str(len(others)), others))
    return "\n".join(lines)


def _line(what: str, rows: Sequence[Row]) -> str:
    """The largest number of tokens and sequences, and the sums of the times."""
    cells = [f"{max(row[name] for row in rows):,.0f}" for name in ("tokens", "sequences")]
    cells += [f"{sum(row[name] for row in rows):,.2f}" for name in ("launch", "host", "card", "idle")]
    return f"| {what} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    config = parse_design("H128-MQA", preset("paper-1b"))
    longest = max(workload.length for workload in WORKLOADS)
    model = random_model(config, "cuda", torch.bfloat16)
    llm = LLM(model, EngineConfig(max_length=longest, max_running=512, prefix_caching=False))
    results: dict[str, Any] = {"environment": describe_environment(), "runs": []}
    for workload in WORKLOADS:
        run(llm, workload, config.vocab_size, seed=0)
        seconds, rows = run(llm, workload, config.vocab_size, seed=1)
        results["runs"].append({"workload": vars(workload), "seconds": seconds, "steps": rows})
        write_json(arguments.out, results)
        print(f"\n{workload}: {seconds * 1e3:.1f} ms\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
