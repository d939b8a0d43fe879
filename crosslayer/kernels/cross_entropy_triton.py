"""The Triton kernel of `cross_entropy`: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cross_entropy_kernel(logits, targets, losses, vocab_size, stride, BLOCK: tl.constexpr, GRAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target >= 0
    # Read here, before the reductions: their barriers come between this and the first write of the gradient.
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        # Each lane keeps a maximum of its own; -inf - -inf is kept from becoming NaN.
        higher = tl.maximum(top, x)
        total = total * tl.exp(tl.where(top == higher, 0.0, top - higher)) + tl.where(inside, tl.exp(x - higher), 0.0)
        top = higher
    highest = tl.max(top, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(losses + row, tl.where(counts, normaliser - at_target, 0.0))
    if GRAD:
        weight = tl.where(counts, 1.0, 0.0)
        for start in range(0, vocab_size, BLOCK):
            place = start + columns
            inside = place < vocab_size
            x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
            gradient = weight * (tl.exp(x - normaliser) - tl.where(place == target, 1.0, 0.0))
            tl.store(logits + place, gradient.to(logits.dtype.element_ty), mask=inside)


def launch_cross_entropy(logits: Tensor, targets: Tensor, want_grad: bool) -> Tensor:
    rows, vocab_size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, vocab_size, logits.stride(0), BLOCK=4096, GRAD=want_grad, num_warps=8
        )
    return losses
