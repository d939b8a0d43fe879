"""The Triton kernels of `tokens`.

A program embeds a token. Where few tokens are drawn, several programs look for each: they have a part of the logits,
and the one that is done last compares what they have found.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.counters import counters
from crosslayer.kernels.counters_triton import arrives_last
from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow

LARGE = 4096  # logits at a time
# About so many programs look for the likeliest tokens, at most so many of them for the same.
PROGRAMS, MOST_PARTS = 256, 16


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
    device = logits.device
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    if count:
        parts = min(MOST_PARTS, PROGRAMS // count, triton.cdiv(vocab_size, LARGE))
        parts = 1 << max(parts, 1).bit_length() - 1  # a power of two
        tops = torch.empty(count * parts, dtype=torch.float32, device=device)
        found = torch.empty(count * parts, dtype=torch.int32, device=device)
        likeliest_kernel[(count, parts)](
            logits, slots, last, tokens, tops, found, counters(device, count), logits.stride(0), SIZE=vocab_size,
            LARGE=LARGE, PARTS=parts, num_warps=8, **dependent_launch(logits),
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
def likeliest_kernel(
    logits, slots, last, tokens, tops, founds, arrived, stride,
    SIZE: tl.constexpr, LARGE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`tops` and `founds` [rows, PARTS] are room for what each part has; `arrived` [rows] counts the parts that are
    done, and is zeros before and after."""
    follow(PDL)
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    PART: tl.constexpr = (SIZE + PARTS - 1) // PARTS
    column = tl.arange(0, LARGE)
    # Each place keeps its own largest so far, and the column it came from.
    top = tl.full((LARGE,), -float("inf"), tl.float32)
    found = tl.zeros((LARGE,), tl.int32)
    end = tl.minimum((part + 1) * PART, SIZE)
    for start in tl.range(part * PART, end, LARGE):
        inside = start + column < end
        value = tl.load(logits + n * stride + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        higher = value > top
        top = tl.where(higher, value, top)
        found = tl.where(higher, start + column, found)
    highest = tl.max(top, 0)
    token = tl.min(tl.where(top == highest, found, SIZE - 1), 0)
    is_last = True
    if PARTS > 1:
        tl.store(tops + n * PARTS + part, highest)
        tl.store(founds + n * PARTS + part, token)
        is_last = arrives_last(arrived + n, PARTS)
        if is_last:
            each = n * PARTS + tl.arange(0, PARTS)
            highests = tl.load(tops + each, cache_modifier=".cg")
            tokens_found = tl.load(founds + each, cache_modifier=".cg")
            token = tl.min(tl.where(highests == tl.max(highests, 0), tokens_found, SIZE - 1), 0)
    if is_last:
        tl.store(tokens + n, token.to(tl.int64))
        tl.store(last + tl.load(slots + n), token.to(tl.int64))
