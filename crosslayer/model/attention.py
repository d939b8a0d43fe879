"""Causal attention through PyTorch's kernels, and the masks it needs.

A mask is one of three things: None for plain causal attention (SDPA's own causal kernels), a FlexAttention BlockMask
where windows or packed documents leave most of the square empty (CUDA), or a boolean tensor [B or 1, 1, T, S] that is
true where a query may look (CPU, and queries against a contiguous cache).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

Mask = Tensor | BlockMask | None

# FlexAttention takes no smaller heads on a GPU.
LEAST_FLEX_DIM = 16


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax(q kᵀ / √D) v for q [B, H, T, D] and k, v [B, G, S, D], where G divides H; returns [B, H, T, D]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        size = q.shape[-1]
        if size < LEAST_FLEX_DIM:  # zeros change no score, and what they add to the values is cut off
            q, k, v = (pad(x, (0, LEAST_FLEX_DIM - size)) for x in (q, k, v))
        output: Tensor = _compiled_flex_attention()(q, k, v, block_mask=mask, scale=size**-0.5, enable_gqa=grouped)
        return output[..., :size]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def attend_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attend`, for T = S, where a query sees the keys before its own only. The first sees none and gets zeros."""
    if q.shape[2] == 1:
        return torch.zeros_like(q)
    return pad(attend(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], None), (0, 0, 1, 0))


def causal_mask(length: int, window: int | None, document_ids: Tensor | None, device: torch.device) -> Mask:
    """The mask for a whole sequence of `length` tokens.

    A token sees itself and the tokens before it: those at most window-1 back where a window is given, and those with
    its own document id where `document_ids` [B, T] are given.
    """
    if document_ids is None and (window is None or window >= length):
        return None
    if device.type == "cuda":

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            see = k <= q
            if window is not None:
                see = see & (q - k < window)
            if document_ids is not None:
                see = see & (document_ids[b, q] == document_ids[b, k])
            return see

        batch = None if document_ids is None else document_ids.shape[0]
        return create_block_mask(visible, batch, None, length, length, device=device)
    positions = torch.arange(length, device=device)[None]
    mask = positional_mask(positions, positions, window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return mask


def positional_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Boolean [B, 1, T, S] for query positions [B, T] and key positions [B, S]; a negative key position is empty."""
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    mask = (distance >= 0) & (keys >= 0)[:, None, None, :]
    return mask if window is None else mask & (distance < window)


@cache
def _compiled_flex_attention() -> Any:
    # Uncompiled FlexAttention stores the whole T x T score matrix.
    return torch.compile(flex_attention, dynamic=False)
