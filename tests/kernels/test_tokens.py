"""Embeddings of tokens known and unknown, and the likeliest tokens, against plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslayer.kernels.tokens import embed, likeliest

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SLOTS = [3, 0, 2, 5]


def check_embed(device: str, dtype: torch.dtype, hidden: int, half: int, embed: Callable[..., Any]) -> None:
    table, cos, sin = torch.randn(11, hidden).to(dtype), torch.randn(9, half), torch.randn(9, half)
    ids, slots, last = torch.tensor([4, -1, 10, -1]), torch.tensor(SLOTS), torch.tensor([7, 1, 1, 1, 1, 0])
    positions = torch.tensor([8, 0, 3, 3])
    inputs = (tensor.to(device) for tensor in (ids, slots, last, table, positions, cos, sin))
    x, some_cos, some_sin = (tensor.cpu() for tensor in embed(*inputs))
    assert torch.equal(x, table[[4, 7, 10, 0]])
    assert torch.equal(some_cos, cos[positions])
    assert torch.equal(some_sin, sin[positions])


def check_likeliest(device: str, dtype: torch.dtype, vocab_size: int, likeliest: Callable[..., Tensor]) -> None:
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, [vocab_size - 1, vocab_size // 2]] = 100.0  # of equal ones, the first
    logits[2] = -1e30
    logits[2, 0] = -1e29
    logits[3, -1] = 100.0
    last = torch.full((6,), 77, device=device)
    tokens = likeliest(logits.to(device), torch.tensor(SLOTS, device=device), last).tolist()
    assert tokens == [int(logits[0].float().argmax()), vocab_size // 2, 0, vocab_size - 1]
    assert last.tolist() == [tokens[1], 77, tokens[2], tokens[0], 77, tokens[3]]


def check_likeliest_of_rows(device: str, rows: int, likeliest: Callable[..., Tensor]) -> None:
    logits = torch.randn(rows, 9000, generator=torch.Generator().manual_seed(rows))
    slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(0))[:rows]
    last = torch.full((rows + 3,), 77, device=device)
    for _ in range(2):
        tokens = likeliest(logits.to(device), slots.to(device), last)
        assert torch.equal(tokens.cpu(), logits.argmax(1))
        assert torch.equal(last.cpu()[slots], logits.argmax(1))
        assert (last == 77).sum() == 3
        logits = -logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_pytorch(dtype: torch.dtype) -> None:
    check_embed("cpu", dtype, 12, 5, embed)
    check_likeliest("cpu", dtype, 50, likeliest)
    check_likeliest_of_rows("cpu", 7, likeliest)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_gpu(dtype: torch.dtype) -> None:
    for hidden, half in ((12, 5), (2048, 64), (3072, 64)):
        check_embed("cuda", dtype, hidden, half, embed)
    for vocab_size in (50, 4096, 4097, 50304):
        check_likeliest("cuda", dtype, vocab_size, likeliest)
    for rows in (1, 2, 7, 100, 300, 5000):
        check_likeliest_of_rows("cuda", rows, likeliest)
