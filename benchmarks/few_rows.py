"""Products of one row on a GPU: each kernel of `crosslayer/kernels/few_rows_triton.py`, and a whole token of them.

    python -m benchmarks.few_rows --out results.json

The shapes are those of the paper's 1B model with CLA2. One run measures the rate of a copy; then each kernel alone, cut
in several ways, over copies of its weight that do not fit in the L2 cache, next to torch's `linear`; then a token: the
products of all layers, with attention over 640 keys between them, and the logits, in one CUDA graph. Each kernel in
turn gets the cut with which the token takes least. "share" is the part of the time in which a copy would have
moved as many bytes as the weights have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu import between, copy_rate, in_a_graph, moment
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.kernels import few_rows_launch as kernels
from crosslayer.kernels import paged_attention as attention
from crosslayer.kernels.few_rows_launch import Launch
from crosslayer.plan.presets import parse_design, preset

CONFIG = parse_design("H128-MQA-CLA2", preset("paper-1b"))
HIDDEN, INNER, HEADS, HEAD_DIM = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_attention_heads, 128
CONTEXT, BLOCK_SIZE = 640, 16
EPS = CONFIG.rms_norm_eps
DEFAULTS = {"qkv": kernels.ROPE_STORE, "o": kernels.ADD, "gate_up": kernels.SWIGLU, "down": kernels.ADD}
DEFAULTS |= {"lm_head": kernels.LOGITS}
CUTS = [Launch(rows, warps) for rows, warps in ((2, 2), (4, 4), (8, 8), (2, 4), (4, 8), (8, 4))]
COLD_BYTES = 3e8  # six L2 caches
Launches = dict[str, Launch]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


def seconds(run: Callable[[], object], timed: int) -> float:
    """Mean seconds of a run on the GPU."""
    for _ in range(3):
        run()
    begin = moment(on_gpu=True)
    for _ in range(timed):
        run()
    return between(begin, moment(on_gpu=True)) / timed


def without_overlap() -> Any:
    """Kernels of few rows begin when the kernel before has ended."""
    return patch.object(kernels, "dependent_launch", lambda x: {"PDL": False, "launch_pdl": False})


@dataclass
class Products:
    """The products of one layer, or the logits, of N tokens: what they read and write besides the weights."""

    residual: Tensor
    places: Tensor
    cos: Tensor
    sin: Tensor
    gain: Tensor
    keys: Tensor
    values: Tensor
    rows: attention.AttentionRows

    @classmethod
    def of(cls, count: int) -> Products:
        angles = torch.rand(count, HEAD_DIM // 2, device="cuda")
        places = CONTEXT - 1 - torch.arange(count, device="cuda")
        keys, values = (draw(CONTEXT // BLOCK_SIZE, BLOCK_SIZE, 1, HEAD_DIM) for _ in range(2))
        starts, lengths, table, firsts = (
            torch.tensor(numbers, device="cuda", dtype=torch.int32)
            for numbers in ([0, count], [CONTEXT], [[*range(len(keys))]], [0])
        )
        rows = attention.AttentionRows(starts, lengths, table, firsts, most_queries=count)
        return cls(draw(count, HIDDEN), places, angles.cos(), angles.sin(), draw(HIDDEN), keys, values, rows)

    def qkv(self, weight: Tensor, launch: Launch) -> Tensor:
        owns = len(weight) > HEADS * HEAD_DIM
        return kernels.project_rope_store(
            self.residual,
            weight,
            EPS,
            self.cos,
            self.sin,
            head_dim=HEAD_DIM,
            num_heads=HEADS,
            num_kv_heads=1,
            bias=None,
            keys=self.keys if owns else None,
            values=self.values if owns else None,
            places=self.places,
            key_scale=1.0,
            value_scale=1.0,
            launch=launch,
        )

    def layer(self, weights: dict[str, Tensor], launches: Launches) -> None:
        q = self.qkv(weights["qkv"], launches["qkv"])
        attended = attention.paged_attention(q, self.keys, self.values, self.rows, window=None)
        kernels.project_add(attended.flatten(1), weights["o"], self.residual, launch=launches["o"])
        inner = kernels.project_swiglu(self.residual, weights["gate_up"], EPS, launch=launches["gate_up"])
        kernels.project_add(inner, weights["down"], self.residual, launch=launches["down"])

    def logits(self, weight: Tensor, launch: Launch) -> Tensor:
        return kernels.project_logits(self.residual, weight, self.gain, EPS, launch=launch)


SHAPES = {"qkv": ((HEADS + 2) * HEAD_DIM, HIDDEN), "o": (HIDDEN, HEADS * HEAD_DIM), "gate_up": (2 * INNER, HIDDEN)}
SHAPES |= {"down": (HIDDEN, INNER), "lm_head": (CONFIG.vocab_size, HIDDEN)}


def run_alone(name: str, products: Products, x: Tensor, weights: Sequence[Tensor], launch: Launch | None) -> None:
    """The same product by each of the weights; without a launch, torch's plain one."""
    for weight in weights:
        if launch is None:
            linear(x, weight)
        elif name == "qkv":
            products.qkv(weight, launch)
        elif name == "gate_up":
            kernels.project_swiglu(x, weight, EPS, launch=launch)
        elif name == "lm_head":
            products.logits(weight, launch)
        else:
            kernels.project_add(x, weight, products.residual, launch=launch)


def measure_alone(rate: float) -> list[dict[str, Any]]:
    """Each kernel by one row over cold weights, in each cut; in the default one also without overlap, and by four."""
    rows = []
    for name, shape in SHAPES.items():
        size = 2 * shape[0] * shape[1]
        weights = [draw(*shape) for _ in range(2 + int(COLD_BYTES / size))]
        default = DEFAULTS[name]
        cases: list[tuple[int, Launch | None, bool]] = [(1, None, True), (kernels.MOST_ROWS, None, True)]
        cases += [(1, default, False), *((1, cut, True) for cut in CUTS), (kernels.MOST_ROWS, default, True)]
        for count, launch, overlap in cases:
            products, x = Products.of(count), draw(count, shape[1])
            torch.cuda.synchronize()  # a kernel may read its weight before the kernel before it has ended
            step = partial(run_alone, name, products, x, weights, launch)
            with nullcontext() if overlap else without_overlap():
                graph = in_a_graph(step)
            spent = seconds(graph.replay, 20) / len(weights)
            row: dict[str, Any] = {"kernel": name, "shape": shape, "tokens": count, "overlap": overlap}
            row |= {"launch": launch and asdict(launch), "microseconds": spent * 1e6, "share": size / rate / spent}
            rows.append(row)
            cut = describe(launch) + ("" if overlap else " no overlap")
            print(f"{name:8} {count} x {cut:26}{spent * 1e6:8.2f} us {row['share']:6.1%}", flush=True)
    return rows


class Token:
    """All weights of the model, and a step of one token through them."""

    def __init__(self) -> None:
        owner, reader = SHAPES, SHAPES | {"qkv": (HEADS * HEAD_DIM, HIDDEN)}
        sources = CONFIG.sharing_plan.key_sources
        shapes = [owner if layer == source else reader for layer, source in enumerate(sources)]
        self.layers = [{name: draw(*shape[name]) for name in shape if name != "lm_head"} for shape in shapes]
        self.lm_head, self.products, self.embedded = draw(*SHAPES["lm_head"]), Products.of(1), draw(1, HIDDEN)
        weights = [weight for layer in self.layers for weight in layer.values()]
        self.bytes = 2 * sum(weight.numel() for weight in [*weights, self.lm_head])
        self.inputs = {size: draw(1, size) for _, size in SHAPES.values()}
        torch.cuda.synchronize()

    def __call__(self, launches: Launches) -> tuple[Tensor, Tensor]:
        """Its logits, and the next token."""
        self.products.residual.copy_(self.embedded)
        for weights in self.layers:
            self.products.layer(weights, launches)
        logits = self.products.logits(self.lm_head, launches["lm_head"])
        return logits, logits.argmax(-1)

    def only_linear(self) -> None:
        """torch's products alone, with nothing between them."""
        weights = [weight for layer in self.layers for weight in layer.values()]
        for weight in [*weights, self.lm_head]:
            linear(self.inputs[weight.shape[1]], weight)

    def seconds(self, launches: Launches) -> float:
        return seconds(in_a_graph(lambda: self(launches)).replay, 40)


def find_launches(token: Token, cuts: Sequence[Launch]) -> tuple[Launches, list[dict[str, Any]]]:
    """The cut of each kernel with which the token takes least, one kernel after the other; and all that was tried."""
    best, tried = dict(DEFAULTS), []
    for name in SHAPES:
        times = {cut: token.seconds(best | {name: cut}) for cut in cuts}
        tried += [{"kernel": name, "launch": asdict(cut), "microseconds": t * 1e6} for cut, t in times.items()]
        best[name] = min(times, key=lambda cut: times[cut])
        told = "  ".join(f"{describe(cut)}: {t * 1e6:.1f}" for cut, t in times.items())
        print(f"token by {name:8} {told}", flush=True)
    return best, tried


def describe(launch: Launch | None) -> str:
    if launch is None:
        return "torch.linear"
    return f"{launch.rows} rows {launch.num_warps} warps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"copy: {rate / 1e12:.2f} TB/s", flush=True)
    results: dict[str, Any] = {"environment": describe_environment(), "copy_bytes_per_second": rate}
    results["alone"] = measure_alone(rate)
    token = Token()
    best, results["cuts"] = find_launches(token, CUTS)
    results["best"] = {name: asdict(launch) for name, launch in best.items()}
    print("best: " + ", ".join(f"{name} {describe(launch)}" for name, launch in best.items()))
    times = {
        "best cuts": token.seconds(best),
        "default cuts": token.seconds(DEFAULTS),
        "torch's products alone": seconds(in_a_graph(token.only_linear).replay, 40),
    }
    with without_overlap():
        times["best cuts, without overlap"] = token.seconds(best)
    results |= {"token_bytes": token.bytes, "token": {}}
    for name, spent in times.items():
        share = token.bytes / rate / spent
        results["token"][name] = {"microseconds": spent * 1e6, "share": share}
        print(f"a token, {name:32}{spent * 1e6:8.1f} us {share:6.1%}")
    write_json(arguments.out, results)


if __name__ == "__main__":
    main()
