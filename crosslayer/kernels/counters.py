"""Counters by which the programs of a kernel find out which of them is done last."""

from __future__ import annotations

import torch
from torch import Tensor

# By device, the largest last. Smaller ones stay: a CUDA graph may use them.
_COUNTERS: dict[torch.device, list[Tensor]] = {}


def counters(device: torch.device, size: int) -> Tensor:
    """At least so many counters [size] (int32), which are zeros between two kernels. All kernels of a device share
    them.

    So kernels with counters must not run on two streams of a device at a time. Whoever captures a graph has run what it
    captures before, as for compilation, so that no counters are made, and set to zero, as a part of the graph.
    """
    made = _COUNTERS.setdefault(device, [])
    if not made or len(made[-1]) < size:
        made.append(torch.zeros(max(4096, size), dtype=torch.int32, device=device))
    return made[-1]
