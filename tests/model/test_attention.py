"""Masks of FlexAttention, which only a GPU makes by itself, against the boolean ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from crosslayer.model import attention


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("head_dim", [10, 20])  # less than FlexAttention takes on a GPU, and more
@pytest.mark.parametrize("groups", [2, 4])
def test_block_masks_see_what_boolean_masks_see(groups: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def uncompiled(q: torch.Tensor, *arguments: torch.Tensor, **options: object) -> object:
        sizes.append(q.shape[-1])
        return flex_attention(q, *arguments, **options)

    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: uncompiled)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 40, head_dim, dtype=torch.float64, generator=generator) for heads in (4, groups, groups)
    )
    block_mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < 7), None, None, 40, 40, device="cpu")
    got = attention.attend(q, k, v, block_mask)
    torch.testing.assert_close(got, attention.attend(q, k, v, attention.causal_mask(40, 7, None, torch.device("cpu"))))
    assert sizes == [max(16, head_dim)]
