"""Causal attention through PyTorch's kernels, and the masks it needs.

A mask is one of four things: None for plain causal attention (SDPA's own causal kernels), a FlexAttention BlockMask
where windows or packed documents leave most of the square empty (CUDA), a boolean tensor [B or 1, 1, T, S] that is true
where a query may look (CPU, and queries against a contiguous cache), or a PagedMask, with which keys and values are the
whole pool of a paged cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class PagedRows:
    """Rows of a flat batch that have n queries each.

    `queries` [R * n] numbers their queries in the batch, row by row; `table` [R, M] the blocks of their keys; `mask`
    [R, 1, n, M * block_size] is true where a query may look.
    """

    queries: Tensor
    table: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PagedMask:
    """How the queries of a flat batch look at the blocks of a pool.

    Keys and values are what is in the pool times `key_scale` and `value_scale`.
    """

    rows: tuple[PagedRows, ...]
    key_scale: float = 1.0
    value_scale: float = 1.0


Mask = Tensor | BlockMask | PagedMask | None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax(q kᵀ / √D) v for q [B, H, T, D] and k, v [B, G, S, D], where G divides H; returns [B, H, T, D].

    With a PagedMask B is 1, and k and v are pools [blocks, block_size, G, D].
    """
    if isinstance(mask, PagedMask):
        return _paged_attend(q, k, v, mask)
    k, v = k.to(q.dtype), v.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        output: Tensor = _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=grouped)
        return output
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


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


def _paged_attend(q: Tensor, k: Tensor, v: Tensor, mask: PagedMask) -> Tensor:
    """Attention over block tables with nothing but gathers and SDPA: what a kernel over the pool must compute."""
    heads, _, size = q.shape[1:]
    output = torch.empty_like(q)
    q = q * mask.key_scale  # the scales are powers of two, so it is the same wherever they come in
    for rows in mask.rows:
        count = len(rows.table)
        q_rows = q[0, :, rows.queries].view(heads, count, -1, size).transpose(0, 1)
        k_rows, v_rows = (pool[rows.table].flatten(1, 2).transpose(1, 2).to(q.dtype) for pool in (k, v))
        grouped = heads != k_rows.shape[1]
        out = scaled_dot_product_attention(q_rows, k_rows, v_rows, attn_mask=rows.mask, enable_gqa=grouped)
        output[0, :, rows.queries] = out.transpose(0, 1).flatten(1, 2)
    return output * mask.value_scale


@cache
def _compiled_flex_attention() -> Any:
    # Uncompiled FlexAttention stores the whole T x T score matrix.
    return torch.compile(flex_attention, dynamic=False)
