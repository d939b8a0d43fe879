"""The Triton kernels of `tokens`: a program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow

LARGE = 4096  # logits at a time


def launch_embed(
    ids: Tensor, slots: Tensor, last: Tensor, embedding: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, half = embedding.shape[1], cos.shape[1]
    x = embedding.new_empty(len(ids), hidden)
    some_cos, some_sin = (table.new_empty(len(ids), half) for table in (cos, sin))
    if len(ids):
        embed_kernel[(len(ids),)](
            ids, slots, last, embedding, positions, cos, sin, x, some_cos, some_sin, HIDDEN=hidden, HALF=half,
            WIDTH=triton.next_power_of_2(hidden), HALF_WIDTH=triton.next_power_of_2(half), num_warps=4,
            # Not before what the host has sent is there.
            **dependent_launch(x) | {"launch_pdl": False},
        )  # fmt: skip
    return x, some_cos, some_sin


def launch_likeliest(logits: Tensor, slots: Tensor, last: Tensor) -> Tensor:
    count, vocab_size = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count:
        likeliest_kernel[(count,)](
            logits, slots, last, tokens, logits.stride(0), SIZE=vocab_size, LARGE=LARGE, num_warps=8,
            **dependent_launch(logits),
        )  # fmt: skip
    return tokens


@triton.jit
def embed_kernel(
    ids, slots, last, embedding, positions, cos, sin, x, some_cos, some_sin,
    HIDDEN: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, HALF_WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    follow(PDL)
    n = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + n)
    if token < 0:
        token = tl.load(last + tl.load(slots + n))
    column = tl.arange(0, WIDTH)
    row = tl.load(embedding + token * HIDDEN + column, mask=column < HIDDEN)
    tl.store(x + n * HIDDEN + column, row, mask=column < HIDDEN)
    position = tl.load(positions + n)
    column = tl.arange(0, HALF_WIDTH)
    for_cos = tl.load(cos + position * HALF + column, mask=column < HALF)
    for_sin = tl.load(sin + position * HALF + column, mask=column < HALF)
    tl.store(some_cos + n * HALF + column, for_cos, mask=column < HALF)
    tl.store(some_sin + n * HALF + column, for_sin, mask=column < HALF)


@triton.jit
def likeliest_kernel(logits, slots, last, tokens, stride, SIZE: tl.constexpr, LARGE: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, LARGE)
    # Each place keeps its own largest so far, and the column it came from.
    top = tl.full((LARGE,), -float("inf"), tl.float32)
    found = tl.zeros((LARGE,), tl.int32)
    for start in tl.range(0, SIZE, LARGE):
        inside = start + column < SIZE
        value = tl.load(logits + n * stride + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        higher = value > top
        top = tl.where(higher, value, top)
        found = tl.where(higher, start + column, found)
    token = tl.min(tl.where(top == tl.max(top, 0), found, SIZE - 1), 0).to(tl.int64)
    tl.store(tokens + n, token)
    tl.store(last + tl.load(slots + n), token)
