"""Training speed on one GPU: ours next to transformers' Llama of the same shape, and the card's own matmul rate.

    python -m benchmarks.train_speed --out results.json

One run measures everything: an 8192³ bf16 matmul (before and after), our optimizer step (MQA and CLA2) and the peer's,
at several batch sizes. Model FLOPs are 6 per weight outside the embedding and 12·L·H·D·T/2 for causal attention, per
token. The peer is transformers' LlamaForCausalLM under torch.compile with bf16 autocast, gradient clipping and fused
AdamW.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import matmul_rate, random_model, seconds
from crosslayer.data import Batch
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.plan import ModelConfig
from crosslayer.plan.cost import Recompute, num_parameters
from crosslayer.plan.presets import parse_design, preset
from crosslayer.train import Recipe
from crosslayer.train.step import TrainStep

SMALL = ModelConfig(
    vocab_size=16384, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=4, head_dim=128
)
# Shape, sequence length, and (design, sequences per step, of which at a time) for us and for the peer.
SHAPES: dict[str, tuple[ModelConfig, int, list[tuple[str, int, int]], list[int]]] = {
    "1b": (
        preset("paper-1b"),
        2048,
        [
            ("H128-MQA", 8, 8),
            ("H128-MQA", 16, 16),
            ("H128-MQA-CLA2", 16, 16),
            ("H128-MQA", 64, 16),
            ("H128-MQA-CLA2", 64, 16),
        ],
        [16],
    ),
    "small": (
        SMALL,
        1024,
        [("H128-MQA", 128, 128), ("H128-MQA-CLA2", 128, 128), ("H128-MQA", 32, 32), ("H128-MQA-CLA2", 32, 32)],
        [],
    ),
}
WARM_UP, TIMED = 3, 6


def flops_per_token(config: ModelConfig, length: int) -> float:
    weights = num_parameters(config) - config.vocab_size * config.hidden_size
    return 6 * weights + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2


def our_step(
    config: ModelConfig,
    length: int,
    batch_size: int,
    micro: int,
    recompute: Recompute = "none",
    mesh: DeviceMesh | None = None,
) -> Callable[[], object]:
    """A step of `batch_size` sequences, over all processes of the mesh."""
    recipe = Recipe(
        tokens=10**12,
        sequence_length=length,
        batch_size=batch_size,
        micro_batch_size=micro,
        activation_checkpointing=recompute,
    )
    step = TrainStep(random_model(config, "cuda", torch.float32), recipe, mesh)
    rows = batch_size // (1 if mesh is None else mesh["data"].size())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    return lambda: step(0, batch)


def peer_step(config: ModelConfig, length: int, batch_size: int) -> Callable[[], object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    # An unshared config of ours is a Llama config.
    model = LlamaForCausalLM(LlamaConfig.from_dict({**config.to_dict(), "use_cache": False})).cuda()
    compiled: Any = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, config.vocab_size, (batch_size, length), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Kernels by what they do, told by their names; the first that matches counts.
KINDS = {
    "communication": ("nccl",),
    "attention": ("cudnn", "flash", "fmha"),
    "matmul": ("nvjet", "gemm", "cutlass", "splitk"),
    "loss": ("cross_entropy",),
    "optimizer": ("multi_tensor_apply",),
    "elementwise": ("",),
}


def kernel_milliseconds(step: Callable[[], object]) -> dict[str, float]:
    """What the kernels of one step take, by kind."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        kind = next(kind for kind, words in KINDS.items() if any(word in event.key.lower() for word in words))
        spent[kind] += event.self_device_time_total / 1e3
    return spent


def measure(
    make: Callable[[], Callable[[], object]], tokens: int, flops: float, ceiling: float, timed: int = TIMED
) -> dict[str, Any]:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make()
        duration, first = seconds(step, WARM_UP, timed)
        peak = torch.cuda.max_memory_allocated()
        kernels = kernel_milliseconds(step)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    rate = tokens / duration
    return {
        "tokens_per_second": rate,
        "tflops": rate * flops / 1e12,
        "share_of_matmul": rate * flops / ceiling,
        "first_step_seconds": first,
        "peak_gib": peak / 2**30,
        "kernel_milliseconds": kernels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="(default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "matmul_tflops": matmul_rate() / 1e12, "rows": []}
    print(f"8192^3 bf16 matmul: {results['matmul_tflops']:.0f} TFLOP/s", flush=True)
    for name in arguments.shape or SHAPES:
        shape, length, ours, peers = SHAPES[name]
        cases = [(design, batch, micro, False) for design, batch, micro in ours]
        cases += [("H128-MQA", batch, batch, True) for batch in peers]
        for design, batch, micro, peer in cases:
            config = parse_design(design, shape)

            make = (
                partial(peer_step, config, length, batch) if peer else partial(our_step, config, length, batch, micro)
            )
            row = {"shape": name, "who": "transformers" if peer else "crosslayer", "design": design}
            row |= {"batch": batch, "micro_batch": micro, "sequence": length}
            flops, ceiling = flops_per_token(config, length), results["matmul_tflops"] * 1e12
            row |= measure(make, batch * length, flops, ceiling)
            results["rows"].append(row)
            write_json(arguments.out, results)
            told = row.get("error") or (
                f"{row['tokens_per_second']:>10,.0f} tokens/s  {row['tflops']:4.0f} TFLOP/s "
                f"{row['share_of_matmul']:6.1%}  {row['peak_gib']:5.1f} GiB  first {row['first_step_seconds']:.1f} s"
            )
            print(f"{name:6}{row['who']:13}{design:15}{batch:4} x {length} by {micro:<4}{told}", flush=True)
    results["matmul_tflops_after"] = matmul_rate() / 1e12
    write_json(arguments.out, results)
    print(f"8192^3 bf16 matmul again: {results['matmul_tflops_after']:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
