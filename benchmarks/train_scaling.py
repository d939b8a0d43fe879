"""Training speed on all GPUs of a machine next to one of them: the same work for each GPU (weak scaling).

    torchrun --nproc-per-node 2 -m benchmarks.train_scaling --out results.json

First one GPU trains alone, as `crosslayer train` does, while the others wait; then all together with FSDP2, and last
with their matrices divided among them (tensor parallelism), on as many sequences in all.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.gpu import matmul_rate
from benchmarks.train_speed import flops_per_token, measure, our_step
from crosslayer.environment import describe_environment
from crosslayer.files import write_json
from crosslayer.plan.presets import parse_design, preset

LENGTH = 2048
# Design, sequences of a step for each GPU, of which at a time.
CASES = [("H128-MQA", 16, 16), ("H128-MQA-CLA2", 16, 16), ("H128-MQA", 64, 16), ("H128-MQA-CLA2", 64, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("start it with torchrun, on two GPUs or more")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    first, count = dist.get_rank() == 0, dist.get_world_size()
    ceiling = matmul_rate()
    results: dict[str, Any] = {"environment": describe_environment(), "matmul_tflops": ceiling / 1e12, "rows": []}
    meshes = {
        ways: init_device_mesh("cuda", (count // ways, ways), mesh_dim_names=("data", "tensor")) for ways in (1, count)
    }
    for design, batch, micro in CASES:
        config = parse_design(design, preset("paper-1b"))
        flops = flops_per_token(config, LENGTH)
        alone = 0.0
        for gpus, ways in ((1, 1), (count, 1), (count, count)):
            row: dict[str, Any] = {"design": design, "gpus": gpus, "tensor_parallel": ways}
            row |= {"batch": batch * gpus, "micro_batch": micro, "sequence": LENGTH}
            mesh = meshes[ways] if gpus > 1 else None
            make = partial(our_step, config, LENGTH, batch * gpus, micro, mesh=mesh)
            if gpus > 1 or first:
                row |= measure(make, batch * gpus * LENGTH, flops, gpus * ceiling)
            dist.barrier()
            if not first:
                continue
            rate = row.get("tokens_per_second", 0.0)
            alone = alone or rate
            row["times_one_gpu"] = rate / alone if alone else None
            results["rows"].append(row)
            write_json(arguments.out, results)
            told = row.get("error") or f"{rate:>9,.0f} tokens/s ({rate / alone:.2f} x one), {row['peak_gib']:.1f} GiB"
            case = f"{gpus} GPU(s), TP {ways}  {design:15}{batch * gpus:4} x {LENGTH} by {micro:<4}"
            print(f"{case}{told}, first step {row.get('first_step_seconds', 0):.0f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
