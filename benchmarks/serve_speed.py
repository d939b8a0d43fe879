"""Serving speed on one GPU: our engine, transformers and vLLM on the same workloads, next to what the card can do.

    python -m benchmarks.serve_speed --out results.json
    python -m benchmarks.serve_speed --out results.json --only vllm --vllm-site FOLDER
    python -m benchmarks.serve_speed --out results.json --table

The paper's 1B shape with random weights in bf16; greedy, random prompts, nothing ends a sequence early. Each engine
runs in a process of its own. What it measured before it failed or ran out of time is kept; --only measures one of them
again, in place of what the file has of it. First come the card's ceilings, a copy of 2 GiB and an 8192³ matmul, and
from these the limit of each workload (`benchmarks.workloads.least_seconds`). The median of up to three runs counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import copy_rate, matmul_rate, random_model
from benchmarks.peers import Row, measures, transformers_rows, vllm_rows
from benchmarks.workloads import Ceilings, Workload, least_seconds, time_runs
from crosslayer.engine import LLM, EngineConfig, SamplingParams
from crosslayer.environment import describe_environment
from crosslayer.files import read_json, write_json
from crosslayer.plan import ModelConfig, parse_design, preset
from crosslayer.plan.units import format_bytes

WORKLOADS = (
    Workload(1, 512, 512),
    Workload(64, 512, 128),
    Workload(64, 2048, 128),
    Workload(512, 512, 256),
    Workload(128, 512, 64),  # no more than this, because of transformers' continuous batching
)
SHAPE = preset("paper-1b")
PEERS_DESIGN = "H128-MQA"
DESIGNS = (PEERS_DESIGN, "H128-MQA-CLA2")
# Between engines with caches of these sizes, the memory that a token of cache takes can be read off the allocator.
CAPACITY_BYTES = (4 * 2**30, 16 * 2**30)


def our_rows(config: ModelConfig, workloads: Iterable[Workload], device: str) -> Iterator[Row]:
    """Our engine, with a place for each of 512 sequences and no prefix cache, as the peers."""
    workloads = list(workloads)
    model = random_model(config, device, torch.bfloat16)
    longest = max(workload.length for workload in workloads)
    llm = LLM(model, EngineConfig(max_length=longest, max_running=512, prefix_caching=False))
    for workload in workloads:
        params = SamplingParams(max_tokens=workload.new_tokens, ignore_eos=True)

        def generate(prompts: list[list[int]], params: SamplingParams = params) -> list[int]:
            return [len(samples[0].token_ids) for samples in llm.generate(prompts, params)]

        spent = time_runs(generate, workload, config.vocab_size)
        yield {"who": "crosslayer"} | measures(workload, spent)


def capacity_row(config: ModelConfig, device: str, sizes: Sequence[int] = CAPACITY_BYTES) -> Row:
    """Tokens that the engine says its cache holds in the largest of these memories, and, on a GPU, the bytes that the
    allocator gave out per token: the difference of two engines, which are the same but for their cache."""
    model = random_model(config, device, torch.bfloat16)
    tokens, allocated = [], []
    for size in sizes:
        before = torch.cuda.memory_allocated()
        llm = LLM(model, EngineConfig(cache_bytes=size, max_running=1))
        tokens.append(llm.engine.cache_tokens)
        allocated.append(torch.cuda.memory_allocated() - before)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    row = {"who": "crosslayer", "cache_bytes": sizes[-1], "cache_tokens": tokens[-1]}
    if device == "cuda":
        row["allocated_bytes_per_token"] = (allocated[-1] - allocated[0]) / (tokens[-1] - tokens[0])
    return row


def our_rows_and_capacity(config: ModelConfig, workloads: Iterable[Workload], device: str) -> Iterator[Row]:
    yield from our_rows(config, workloads, device)
    gc.collect()
    yield capacity_row(config, device)


class Runner(NamedTuple):
    rows: Callable[[ModelConfig, Iterable[Workload], str], Iterator[Row]]
    workloads: tuple[Workload, ...]
    timeout: float  # seconds, for each design


RUNNERS = {
    "ours": Runner(our_rows_and_capacity, WORKLOADS, 150),
    "transformers": Runner(transformers_rows, (WORKLOADS[0], WORKLOADS[1], WORKLOADS[-1]), 180),
    "vllm": Runner(vllm_rows, WORKLOADS, 240),
}
# vLLM in one process, with nothing that it would compile or fetch first.
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def run_here(who: str, design: str, out: Path) -> None:
    """Measure one engine in this process: a line of JSON in `out` as soon as there is a row."""
    runner = RUNNERS[who]
    with out.open("w", encoding="utf-8") as file:
        for row in runner.rows(parse_design(design, SHAPE), runner.workloads, "cuda"):
            print(json.dumps({**row, "design": design}), file=file, flush=True)


def run_apart(who: str, design: str, vllm_site: Path | None) -> tuple[list[Row], str | None]:
    """The rows of one engine, measured in another process, and what went wrong with it."""
    environment = dict(os.environ)
    if who == "vllm":
        environment |= VLLM_ENVIRONMENT
        if vllm_site:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(vllm_site), environment.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        command = [sys.executable, "-m", "benchmarks.serve_speed", "--run-here", who]
        command += ["--designs", design, "--out", str(out)]
        failed = None
        try:
            status = subprocess.run(command, env=environment, timeout=RUNNERS[who].timeout, check=False).returncode
            if status:
                failed = f"exit status {status}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {RUNNERS[who].timeout:.0f} s"
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")], failed


def compare(runs: Mapping[str, Any]) -> list[Row]:
    """The rows that have a workload, by workload, each with the workload's limit and its share of it. `times` says how
    many times as fast our engine was with the same design and workload (None: it was not measured)."""
    rows = [(row, Ceilings(**run["ceilings"])) for run in runs.values() for row in run["rows"] if "workload" in row]
    ours = {_case(row): row["tokens_per_second"] for row, _ in rows if row["who"] == "crosslayer"}
    compared = []
    for row, ceilings in sorted(rows, key=lambda pair: list(pair[0]["workload"].values())):
        workload = Workload(**row["workload"])
        seconds = least_seconds(parse_design(row["design"], SHAPE), workload, ceilings)
        limit, reached = workload.requests * workload.new_tokens / seconds, row["tokens_per_second"]
        times = ours[_case(row)] / reached if _case(row) in ours else None
        compared.append({**row, "workload": workload, "limit": limit, "share": reached / limit, "times": times})
    return compared


def _case(row: Row) -> tuple[object, ...]:
    return (row["design"], *row["workload"].values())


def table(runs: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for name, run in runs.items():
        ceilings, here = Ceilings(**run["ceilings"]), run["environment"]
        told = f"{ceilings.bytes_per_second / 1e12:.2f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s"
        lines.append(f"{name}: {here['gpu']}, torch {here['torch']}, {here['time']}; {told}; {run['failed'] or 'done'}")
    lines += ["", "| workload | engine | design | tokens/s | of the limit | crosslayer is |"]
    lines += ["|---|---|---|---:|---:|---:|"]
    for row in compare(runs):
        times = f"{row['times']:.2f} times as fast" if row["times"] and row["who"] != "crosslayer" else ""
        rate = f"{row['tokens_per_second']:,.0f} | {row['share']:.0%} of {row['limit']:,.0f}"
        lines.append(f"| {row['workload']} | {row['who']} | {row['design']} | {rate} | {times} |")
    lines += [
        "",
        "| engine | design | cache | tokens it holds | bytes allocated for each |",
        "|---|---|---:|---:|---:|",
    ]
    for row in (row for run in runs.values() for row in run["rows"]):
        if "cache_bytes" in row:
            size, allocated = format_bytes(row["cache_bytes"]), f"{row['allocated_bytes_per_token']:,.0f}"
            lines.append(f"| {row['who']} | {row['design']} | {size} | {row['cache_tokens']:,} | {allocated} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    parser.add_argument("--only", choices=RUNNERS, action="append", help="measure this engine again (default: all)")
    parser.add_argument("--designs", default=",".join(DESIGNS), help="of ours (default: %(default)s)")
    parser.add_argument("--vllm-site", type=Path, metavar="FOLDER", help="where vLLM is, if not installed")
    parser.add_argument("--table", action="store_true", help="print what is in FILE, measure nothing")
    parser.add_argument("--run-here", choices=RUNNERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out, designs = arguments.out, arguments.designs.split(",")
    if arguments.run_here:
        run_here(arguments.run_here, designs[0], out)
        return
    if not arguments.table:
        measure(out, arguments.only or list(RUNNERS), designs, arguments.vllm_site)
    print(table(read_json(out)["runs"]))


def measure(out: Path, engines: Sequence[str], designs: Sequence[str], vllm_site: Path | None) -> None:
    runs = read_json(out)["runs"] if out.exists() else {}
    here, ceilings = describe_environment(), Ceilings(copy_rate(), matmul_rate())
    torch.cuda.empty_cache()
    if others := {run["environment"]["gpu"] for run in runs.values()} - {here["gpu"]}:
        raise SystemExit(f"{out} was measured on {others.pop()} and this is {here['gpu']}; give another file")
    for who in engines:
        for design in designs if who == "ours" else [PEERS_DESIGN]:
            rows, failed = run_apart(who, design, vllm_site)
            run = {"environment": here, "ceilings": asdict(ceilings), "rows": rows, "failed": failed}
            runs[f"{who}, {design}"] = run
            write_json(out, {"runs": runs})
            if failed:
                print(f"{who}, {design}: {failed}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
