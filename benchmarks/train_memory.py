"""Peak memory of training on one GPU, next to what `crosslayer train --dry-run` expects.

    python benchmarks/train_memory.py --out results.json

Two optimizer steps of each case: designs whose layers keep different things, both ways to recompute, micro batches.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosslayer.data import Batch
from crosslayer.environment import describe_environment
from crosslayer.model import Transformer
from crosslayer.plan import parse_design, preset
from crosslayer.plan.training_memory import Recompute, training_memory
from crosslayer.train import Recipe
from crosslayer.train.step import TrainStep

LENGTH = 2048
# Preset, design, sequences per step, of which at a time, what is recomputed.
CASES: list[tuple[str, str, int, int, Recompute]] = [
    ("paper-1b", "H128-MQA", 8, 8, "none"),
    ("paper-1b", "H128-MQA", 4, 1, "none"),
    ("paper-1b", "H128-MHA", 8, 8, "none"),
    ("paper-1b", "H128-GQA4-CLA2", 8, 8, "none"),
    ("paper-1b", "H512-MQA-CLA2", 8, 8, "none"),
    ("paper-1b", "H128-MQA-CLA2", 16, 8, "none"),
    ("paper-1b", "H128-MQA-CLA2", 32, 32, "block"),
    ("paper-1b", "H128-MQA-CLA2", 32, 32, "group"),
    ("paper-1b", "H128-MQA-yoco", 8, 8, "group"),
    ("paper-3b", "H128-MQA-CLA2", 4, 4, "none"),
    ("paper-3b", "H128-MQA-CLA2", 16, 8, "block"),
]


def peak_bytes(name: str, design: str, batch_size: int, micro: int, recompute: Recompute) -> int:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = parse_design(design, preset(name))
    recipe = Recipe(
        tokens=10**12,
        sequence_length=LENGTH,
        batch_size=batch_size,
        micro_batch_size=micro,
        activation_checkpointing=recompute,
    )
    step = TrainStep(Transformer(config).cuda(), recipe)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, LENGTH + 1))
    for _ in range(2):  # the second has the optimizer's moments from the start
        step(0, Batch(tokens[:, :-1], tokens[:, 1:]))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"environment": describe_environment(), "rows": []}
    for name, design, batch_size, micro, recompute in CASES:
        expected = training_memory(
            parse_design(design, preset(name)),
            tokens=micro * LENGTH,
            micro_batches=batch_size // micro,
            recompute=recompute,
        )
        row: dict[str, Any] = {"preset": name, "design": design, "batch": batch_size, "micro_batch": micro}
        row |= {"sequence": LENGTH, "recompute": recompute, "expected_peak": expected.peak}
        try:
            row["measured_peak"] = peak_bytes(name, design, batch_size, micro, recompute)
            told = f"measured {row['measured_peak'] / 2**30:5.2f} GiB"
        except torch.OutOfMemoryError:
            told = row["error"] = "out of memory"
        results["rows"].append(row)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        case = f"{name} {design:16}{batch_size:3} x {LENGTH} by {micro:<3}{recompute:6}"
        print(f"{case} expected {expected.peak / 2**30:5.2f}, {told}", flush=True)


if __name__ == "__main__":
    main()
