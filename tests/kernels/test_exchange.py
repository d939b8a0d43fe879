"""What goes between a GPU and page-locked memory, place by place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def check(device: str, count: int, fetch: Callable[..., None], give: Callable[..., None]) -> None:
    """`count` tokens, and twice as many words, within larger places."""
    pinned = device == "cuda"
    sent = torch.randint(256, (2, 8 * count + 32), dtype=torch.uint8, pin_memory=pinned)
    given = torch.full((2, count + 3), -1, pin_memory=pinned)
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    to = torch.zeros(8 * count, dtype=torch.uint8, device=device)
    for step in range(3):
        fetch(sent, turn, to)
        assert torch.equal(to.cpu(), sent[step % 2, : 8 * count])
        tokens = torch.arange(count, device=device) + 10**12 * (step + 1)
        give(tokens, given, turn)
        assert turn.item() == (step + 1) % 2
        assert torch.equal(given[step % 2, :count], tokens.cpu())
        assert given[step % 2, count:].tolist() == [-1] * 3
        assert given[1, 0] == (-1 if step == 0 else 2 * 10**12)


@needs_cuda
@pytest.mark.parametrize("count", [1, 7, 1500])
def test_on_gpu(count: int) -> None:
    from crosslayer.kernels.exchange_triton import fetch, give

    check("cuda", count, fetch, give)
