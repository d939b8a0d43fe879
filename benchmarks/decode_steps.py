"""A decode step on one GPU: the engine's CUDA graph by number of sequences, and the same without some of its parts.

    python -m benchmarks.decode_steps --out results.json
    python -m benchmarks.decode_steps --out results.json --table

The paper's 1B shape with random weights in bf16; all sequences have 640 tokens, each in blocks of its own. A graph is
replayed several times, and the median counts. The least time is that of the card's ceilings, measured in the same run
(`benchmarks.workloads.least_seconds`). Without attention, what follows gets its queries instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import copy_rate, matmul_rate, median_seconds, random_model
from benchmarks.workloads import Ceilings, Workload, least_seconds
from crosslayer.engine import EngineConfig, prepared
from crosslayer.engine import runner as runner_module
from crosslayer.engine.batch import Batch, Shape
from crosslayer.engine.graphs import capture
from crosslayer.engine.runner import Runner
from crosslayer.engine.transfer import pack, unpack
from crosslayer.environment import describe_environment
from crosslayer.files import read_json, write_json
from crosslayer.kernels import project
from crosslayer.plan import ModelConfig, parse_design, preset

DESIGNS = ("H128-MQA", "H128-MQA-CLA2")
ROWS = (1, 4, 8, 16, 32, 48, 64, 128, 256, 512)
LENGTH = 640

Row = dict[str, Any]


def unattended(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """In place of attention."""
    return q.contiguous()


def without(part: str) -> AbstractContextManager[Any]:
    """Graphs captured in this context lack the part."""
    if part == "attention":
        return patch.object(prepared, "paged_attention", unattended)
    if part == "fused products":  # those of three rows and more
        return patch.object(project, "SOME_ROWS", project.FEW_ROWS)
    assert part == "reading ahead"
    # Triton is there only where there is a GPU.
    from crosslayer.kernels import paged_attention_launch

    return patch.object(paged_attention_launch, "READ_AHEAD", range(0))


def runner_of(config: ModelConfig, rows: int, length: int, device: str) -> Runner:
    """A runner with a cache for so many sequences, without graphs of its own."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with patch.object(runner_module, "graph_shapes", lambda most: []):
        settings = EngineConfig(max_running=rows)
        return Runner(random_model(config, device, dtype), settings, length + settings.block_size, torch.device(device))


def step_of(runner: Runner, rows: int, length: int) -> Callable[[], object]:
    """A step of so many sequences: a graph's replay, or on a CPU its launches."""
    if runner.overlaps:
        graphed = capture(runner.compute, runner.builder, [Shape(rows, rows)])[rows, rows]
        place_sequences(runner, graphed.batch, length)
        graphed.exchange.batches.copy_(graphed.exchange.packed)  # from where each replay fetches it again
        return graphed.graph.replay
    host = runner.builder.on_host([], Shape(rows, rows))
    batch = runner.builder.on_device(host, unpack(pack(host.arrays, pinned=False), host.arrays))
    place_sequences(runner, batch, length)
    return lambda: runner.compute(batch)


def place_sequences(runner: Runner, batch: Batch, length: int) -> None:
    """Give every row of a batch of nothing but fillers a sequence that gets its last token, and blocks of its own."""
    needed = -(-length // runner.cache.block_size)
    batch.positions.fill_(length - 1)
    for span, rows in batch.rows.items():
        count = len(rows.lengths)
        assert count * needed <= runner.cache.num_blocks[span]
        blocks = torch.arange(count * needed, dtype=torch.int32, device=rows.tables.device).view(count, needed)
        rows.tables[:, :needed] = blocks
        rows.lengths.fill_(length)
        batch.places[span].copy_(blocks[:, -1] * runner.cache.block_size + (length - 1) % runner.cache.block_size)


def measure(
    design: str, config: ModelConfig, counts: Sequence[int], length: int, parts: Sequence[str], device: str
) -> Iterator[Row]:
    """Whole steps of each number of rows, and those without each of `parts`."""
    runner = runner_of(config, max(counts), length, device)
    for count in counts:
        for part in (None, *parts):
            with without(part) if part else nullcontext():
                step = step_of(runner, count, length)
            seconds = median_seconds(step)
            yield {"design": design, "rows": count, "length": length, "without": part, "microseconds": seconds * 1e6}


def least_microseconds(config: ModelConfig, rows: int, length: int, ceilings: Ceilings) -> float:
    """Of the step that adds token number `length` to each of `rows` sequences."""
    two, one = (least_seconds(config, Workload(rows, length - 1, new), ceilings) for new in (2, 1))
    return (two - one) * 1e6


def table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """The results as Markdown: a line for each design and number of sequences."""
    parts = list(dict.fromkeys(row["without"] for row in rows if row["without"]))
    heads = ["design", "sequences", "µs", "least", "of the limit", *(f"without {part}" for part in parts)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    times = {(row["design"], row["rows"], row["without"]): row["microseconds"] for row in rows}
    for row in rows:
        if row["without"]:
            continue
        design, count, whole = row["design"], row["rows"], row["microseconds"]
        least = least_microseconds(parse_design(design, preset("paper-1b")), count, row["length"], ceilings)
        cells = [design, str(count), f"{whole:,.0f}", f"{least:,.0f}", f"{least / whole:.0%}"]
        cells += [f"{times[design, count, part]:,.0f}" if (design, count, part) in times else "" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--table", action="store_true", help="print what is in FILE, measure nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        ceilings = Ceilings(copy_rate(), matmul_rate())
        results: dict[str, Any] = {"environment": describe_environment(), "ceilings": vars(ceilings), "rows": []}
        for design in DESIGNS:
            parts = ("attention", "fused products", "reading ahead") if design == DESIGNS[0] else ()
            for row in measure(design, parse_design(design, preset("paper-1b")), ROWS, LENGTH, parts, "cuda"):
                results["rows"].append(row)
                write_json(arguments.out, results)
    results = read_json(arguments.out)
    print(table(results["rows"], Ceilings(**results["ceilings"])))


if __name__ == "__main__":
    main()
