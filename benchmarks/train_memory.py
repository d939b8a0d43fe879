"""Peak memory of training on one GPU with each way to recompute activations, with and without sharing.

    python -m benchmarks.train_memory --out results.json

Next to each peak, what `crosslayer train --dry-run` expects. Peaks are the most that PyTorch had allocated; weights,
gradients and AdamW's moments are in them. Groups are those of the plan: single layers where nothing is shared.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.gpu import matmul_rate
from benchmarks.train_speed import flops_per_token, measure, our_step
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.plan.cost import Recompute
from crosslayer.plan.presets import parse_design, preset
from crosslayer.plan.training_memory import training_memory

LENGTH = 2048
# Preset, design, sequences per step, of which at a time, what is recomputed.
CASES: list[tuple[str, str, int, int, Recompute]] = [
    *(
        ("paper-1b", design, 8, 8, recompute)
        for design in ("H128-MHA", "H128-MHA-CLA2", "H128-MQA", "H128-MQA-CLA2", "H128-MQA-CLA4")
        for recompute in get_args(Recompute)
    ),
    ("paper-1b", "H128-MQA-CLA2", 16, 8, "none"),
    ("paper-3b", "H128-MQA-CLA2", 4, 4, "none"),
    ("paper-3b", "H128-MQA-CLA2", 8, 8, "block"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    ceiling = matmul_rate()
    results: dict[str, Any] = {"environment": describe_environment(), "matmul_tflops": ceiling / 1e12, "rows": []}
    for name, design, batch, micro, recompute in CASES:
        config = parse_design(design, preset(name))
        expected = training_memory(
            config, tokens=micro * LENGTH, micro_batches=batch // micro, recompute=recompute
        ).peak
        row: dict[str, Any] = {"preset": name, "design": design, "batch": batch, "micro_batch": micro}
        row |= {"sequence": LENGTH, "recompute": recompute, "expected_peak_gib": expected / 2**30}
        make = partial(our_step, config, LENGTH, batch, micro, recompute)
        row |= measure(make, batch * LENGTH, flops_per_token(config, LENGTH), ceiling, timed=3)
        results["rows"].append(row)
        write_json(arguments.out, results)
        told = row.get("error") or f"{row['peak_gib']:5.2f} GiB, {row['tokens_per_second']:>7,.0f} tokens/s"
        case = f"{name} {design:15}{batch:3} x {LENGTH} by {micro:<3}{recompute:6}"
        print(f"{case} expected {row['expected_peak_gib']:5.2f}, measured {told}", flush=True)


if __name__ == "__main__":
    main()
