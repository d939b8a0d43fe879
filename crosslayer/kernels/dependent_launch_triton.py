"""Programmatic dependent launch: a kernel's programs are put in place while the kernel before it still runs.

Short kernels that follow each other, as in a decode step, save most of what lies between them. It takes a GPU from
Hopper on. Triton's interpreter knows nothing of it, which is why the kernels are told.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def follow(PDL: tl.constexpr):
    """To be called before anything is read or written: let the next kernel be put in place, and wait for those before.

    A kernel ends after its own wait, so that to wait for the last one is to wait for all.
    """
    let_next_begin(PDL)
    wait_for_previous(PDL)


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Before this, only what no kernel in flight writes may be read: weights, and what the host has sent."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@cache
def can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """What a kernel that calls `follow` is launched with, beside its other arguments."""
    pdl = can_overlap(x.device)
    return {"PDL": pdl, "launch_pdl": pdl}
