"""Attention over a paged cache on one GPU: our kernels, ways to cut them, and the peers' kernels for the same batches.

    python -m benchmarks.attention_kernels --out results.json

One run measures everything: how fast the card copies memory and multiplies matrices (8192³, bf16), then batches of
single queries, of prompts, and of both. Each batch is there several times, with blocks of its own, so that of a large
one nothing is left in the L2 cache when its turn comes again; a small one stays there for everybody. All are replayed
from one CUDA graph. FlexAttention gets pages of 128 tokens, as it cannot skip smaller ones fast; torch's varlen
attention, and SDPA for prompts, get keys and values in one piece; FlashInfer's plans are made outside of the time. The
error is the largest one of the last query of the first and the last row, by the largest output, in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_peers import (
    BLOCK_SIZE,
    DIM,
    Batch,
    Calls,
    flash_infer,
    flex_attention,
    gathered,
    torch_sdpa,
    torch_varlen,
)
from benchmarks.gpu import copy_rate, in_a_graph, matmul_rate, median_seconds
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.kernels.paged_attention import AttentionRows
from crosslayer.kernels.paged_attention_launch import (
    Tiles,
    launch_paged_attention,
    tiles_of_many,
    tiles_of_one,
)

L2_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Shape:
    """Rows as (how many, queries, length)."""

    name: str
    rows: tuple[tuple[int, int, int], ...]
    heads: int = 16
    groups: int = 1
    fp8: bool = False
    sweep: bool = False
    flex: bool = False

    @property
    def each(self) -> list[tuple[int, int]]:
        return [(queries, length) for count, queries, length in self.rows for _ in range(count)]

    @property
    def bytes(self) -> int:
        """Of queries, keys, values and outputs, each once."""
        token = 2 * self.groups * DIM * (1 if self.fp8 else 2)
        return sum(length * token + queries * self.heads * DIM * 4 for queries, length in self.each)

    @property
    def flops(self) -> int:
        return sum(4 * self.heads * DIM * queries * (2 * length - queries + 1) // 2 for queries, length in self.each)


SHAPES = (
    Shape("1 x 640", ((1, 1, 640),), sweep=True),
    Shape("64 x 576", ((64, 1, 576),), sweep=True, flex=True),
    Shape("512 x 640", ((512, 1, 640),), sweep=True, flex=True),
    Shape("64 x 2048", ((64, 1, 2048),)),
    Shape("256 x 2048", ((256, 1, 2048),)),
    Shape("135 x 2048 to 6144, 24 heads", tuple((1, 1, 2048 + 997 * row % 4096) for row in range(135)), 24, sweep=True),
    Shape("8 x 32768", ((8, 1, 32768),)),
    Shape("64 x 2048, 4 key heads", ((64, 1, 2048),), groups=4),
    Shape("256 x 2048, fp8", ((256, 1, 2048),), fp8=True, sweep=True),
    Shape("prompts 4 x 512", ((4, 512, 512),), sweep=True),
    Shape("prompts 16 x 512", ((16, 512, 512),)),
    Shape("prompts 4 x 2048", ((4, 2048, 2048),), flex=True),
    Shape("prompt 8192", ((1, 8192, 8192),), sweep=True, flex=True),
    Shape("prompts 4 x 2048, 4 key heads", ((4, 2048, 2048),), groups=4),
    Shape("prompts 4 x 2048, fp8", ((4, 2048, 2048),), fp8=True),
    Shape("256 x 640 and 4 x 512", ((256, 1, 640), (4, 512, 512)), sweep=True),
)
ONE = [Tiles(16, 64, 8, 2), Tiles(16, 128, 8, 3), Tiles(16, 64, 4, 3), Tiles(16, 64, 4, 2), Tiles(16, 64, 4, 4)]
ONE += [Tiles(16, 32, 4, 4), Tiles(16, 32, 2, 4), Tiles(16, 128, 4, 2)]
MANY = [Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 4), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)]


def make(shape: Shape) -> list[Batch]:
    copies = min(16, 2 + 2 * L2_BYTES // shape.bytes)
    counts, lengths = (torch.tensor(column) for column in zip(*shape.each, strict=True))
    width = -(-int(lengths.max()) // BLOCK_SIZE)
    blocks = torch.randperm(copies * len(lengths) * width, device="cuda", dtype=torch.int32)
    size = (len(blocks), BLOCK_SIZE, shape.groups, DIM)
    keys, values = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if shape.fp8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int().cuda()
    firsts = torch.zeros(len(lengths), dtype=torch.int32, device="cuda")
    batches = []
    for tables in blocks.view(copies, len(lengths), width):
        q = torch.randn(int(counts.sum()), shape.heads, DIM, device="cuda", dtype=torch.bfloat16)
        rows = AttentionRows(starts, lengths.int().cuda(), tables.contiguous(), firsts, int(counts.max()))
        batches.append(Batch(q, keys, values, rows))
    return batches


def ours(batches: list[Batch], **cut: Any) -> Calls:
    return [partial(launch_paged_attention, b.q, b.keys, b.values, b.rows, None, 1.0, 1.0, **cut) for b in batches]


def microseconds(calls: Calls) -> float:
    """Of one call, in the median of several replays of all of them."""

    def step() -> None:
        for call in calls:
            call()

    return median_seconds(in_a_graph(step).replay, 10) * 1e6 / len(calls)


def error(b: Batch, output: Tensor) -> float:
    """Of the last query of the first and the last row."""
    share, worst = b.q.shape[1] // b.keys.shape[2], 0.0
    keys, values = gathered(b, b.keys), gathered(b, b.values)
    for r in (0, len(keys) - 1):
        last = int(b.rows.starts[r + 1]) - 1
        k, v = (x[r].double().repeat_interleave(share, 1) for x in (keys, values))
        weights = (torch.einsum("hd,thd->ht", b.q[last].double(), k) / DIM**0.5).softmax(1)
        want = torch.einsum("ht,thd->hd", weights, v)
        worst = max(worst, ((output[last].double() - want).abs().max() / want.abs().max()).item())
    return worst


def candidates(shape: Shape) -> dict[str, Callable[[list[Batch]], Calls]]:
    found: dict[str, Callable[[list[Batch]], Calls]] = {"ours": ours}
    if shape.sweep:
        queries = {count for count, _ in shape.each}
        one = ONE if 1 in queries else []
        found |= {f"ours, one={tuple(tiles)}": partial(ours, one=tiles) for tiles in one}
        programs = (64, 192, 256, 384) if 1 in queries else ()
        found |= {f"ours, programs={number}": partial(ours, programs=number) for number in programs}
        many = MANY if queries != {1} else []
        found |= {f"ours, many={tuple(tiles)}": partial(ours, many=tiles) for tiles in many}
    if shape.flex:
        found["FlexAttention"] = flex_attention
    if not shape.fp8:
        found["torch varlen"] = torch_varlen
        if len(set(shape.each)) == 1 and shape.each[0][0] == shape.each[0][1]:
            found["torch SDPA"] = torch_sdpa
    return {**found, "FlashInfer": flash_infer}


def measure(shape: Shape, batches: list[Batch], make_calls: Callable[[list[Batch]], Calls]) -> dict[str, Any]:
    try:
        calls = make_calls(batches)
        row = {"error": error(batches[0], calls[0]()), "microseconds": microseconds(calls)}
    except Exception as failure:  # a peer that is missing or fails costs its own rows only
        return {"failed": f"{type(failure).__name__}: {failure}".split("\n")[0][:200]}
    seconds = row["microseconds"] / 1e6
    return row | {"bytes_per_second": shape.bytes / seconds, "flops_per_second": shape.flops / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copies, products = copy_rate(), matmul_rate()
    print(f"copy: {copies / 1e9:.0f} GB/s; 8192^3 bf16 matmul: {products / 1e12:.0f} TFLOP/s", flush=True)
    one = {rows: tiles_of_one(rows, 16, DIM, torch.bfloat16) for rows in (1, 64, 512)}
    usual = {"one": one, "many": tiles_of_many(16, DIM, torch.bfloat16)}
    results: dict[str, Any] = {"environment": describe_environment(), "tiles": usual, "rows": []}
    results |= {"copy_bytes_per_second": copies, "matmul_flops_per_second": products}
    for shape in SHAPES:
        batches = make(shape)
        for name, make_calls in candidates(shape).items():
            row = {"shape": shape.name, "who": name, **measure(shape, batches, make_calls)}
            if "failed" not in row:
                row["share_of_copy"] = row["bytes_per_second"] / copies
                row["share_of_matmul"] = row["flops_per_second"] / products
            results["rows"].append(row)
            write_json(arguments.out, results)
            told = row.get("failed") or (
                f"{row['microseconds']:>8.1f} us  {row['bytes_per_second'] / 1e9:>5.0f} GB/s"
                f" {row['share_of_copy']:>4.0%}  {row['flops_per_second'] / 1e12:>4.0f} TFLOP/s"
                f" {row['share_of_matmul']:>4.0%}  error {row['error']:.0e}"
            )
            print(f"{shape.name:<30}{name:<30}{told}", flush=True)
        del batches
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
