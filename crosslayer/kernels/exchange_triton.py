"""Triton kernels between a GPU and page-locked memory of the host, which has two places, used in turn.

As kernels of a CUDA graph they cost less than copies before and after it, as long as there are few bytes. `turn` [1]
(int32) says on the device whose turn it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow

BLOCK = 1024


def fetch(places: Tensor, turn: Tensor, to: Tensor) -> None:
    """The first bytes of places [2, bytes] whose turn it is, to `to` [up to as many], in multiples of 4.

    What follows must not be launched so that it begins before this has ended: it reads what the host has sent.
    """
    count = to.numel() // 4
    fetch_kernel[(triton.cdiv(count, BLOCK),)](
        places.view(torch.int32), turn, to.view(torch.int32), places.shape[1] // 4, count, BLOCK=BLOCK, num_warps=4
    )


def give(tokens: Tensor, places: Tensor, turn: Tensor) -> None:
    """Tokens [n] (int64) to places [2, n or more]; and it is the other one's turn."""
    give_kernel[(1,)](tokens, places, turn, places.shape[1], len(tokens), BLOCK=BLOCK, **dependent_launch(tokens))


@triton.jit
def fetch_kernel(places, turn, to, stride, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = places + tl.load(turn).to(tl.int64) * stride
    tl.store(to + i, tl.load(mine + i, mask=i < count, other=0), mask=i < count)


@triton.jit
def give_kernel(tokens, places, turn, stride, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    now = tl.load(turn)
    for first in tl.range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        token = tl.load(tokens + i, mask=i < count, other=0)
        tl.store(places + now.to(tl.int64) * stride + i, token, mask=i < count)
    tl.debug_barrier()  # all threads know whose turn it was
    tl.store(turn, 1 - now)
