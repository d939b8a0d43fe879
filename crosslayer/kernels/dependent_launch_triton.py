"""Programmatic dependent launch: a kernel's programs are put in place while the kernel before it still runs.

Short kernels that follow each other, as in a decode step, save most of what lies between them. It takes a GPU from
Hopper on. Triton's interpreter knows nothing of it, which is why the kernels are told (`PDL`).

Several kernels may then be running at a time. What makes that safe:

- A kernel lets the next one begin, and waits for the one before: in one of its programs at least, whatever its inputs,
  as a kernel has ended when all of its programs have. The one before has then ended after its own wait, so that to wait
  for the last one is to wait for all. (A launch without `launch_pdl` waits as a whole before it begins.)
- Before its wait, a program reads only what no kernel in flight writes (weights, and what the host has sent), and
  writes nothing, as a kernel in flight may still be reading that.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def follow(PDL: tl.constexpr):
    """For a kernel that has nothing to do before its wait: to be called first."""
    let_next_begin(PDL)
    wait_for_previous(PDL)


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """The next kernel begins when all programs of this one have called this or have ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Until the kernel before has ended and all that it has written can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """What a kernel that keeps to these rules is launched with on the device of `x`, beside its other arguments."""
    pdl = _can_overlap(x.device)
    return {"PDL": pdl, "launch_pdl": pdl}
