"""Peak memory of training with each way of recomputing activations, with and without sharing, on one GPU.

    python -m benchmarks.train_memory --out results.json

The paper's 1B shape at 8 x 2048 tokens a step. Peak memory is what PyTorch had allocated at most; weights, gradients
and AdamW's moments are in it. Groups are those of the plan: single layers where nothing is shared, pairs with CLA2.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.train_speed import flops_per_token, matmul_rate, measure, our_step
from crosslayer.environment import describe_environment
from crosslayer.model.transformer import Recompute
from crosslayer.plan.presets import parse_design, preset

DESIGNS = ("H128-MHA", "H128-MHA-CLA2", "H128-MQA", "H128-MQA-CLA2", "H128-MQA-CLA4")
BATCH, LENGTH = 8, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    ceiling = matmul_rate()
    results: dict[str, Any] = {"environment": describe_environment(), "matmul_tflops": ceiling / 1e12, "rows": []}
    for design in DESIGNS:
        config = parse_design(design, preset("paper-1b"))
        for recompute in get_args(Recompute):
            make = partial(our_step, config, LENGTH, BATCH, BATCH, recompute)
            row = {"design": design, "batch": BATCH, "sequence": LENGTH, "activation_checkpointing": recompute}
            row |= measure(make, BATCH * LENGTH, flops_per_token(config, LENGTH), ceiling)
            results["rows"].append(row)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
            print(
                f"{design:15}{recompute:7}{row['peak_gib']:6.1f} GiB {row['tokens_per_second']:>8,.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
