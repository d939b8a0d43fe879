"""What others have for attention over a paged cache, for `attention_kernels`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from crosslayer.kernels.paged_attention import AttentionRows

Calls = list[Callable[[], Tensor]]
BLOCK_SIZE, DIM = 16, 128


@dataclass(frozen=True)
class Batch:
    q: Tensor
    keys: Tensor
    values: Tensor
    rows: AttentionRows


def flash_infer(batches: list[Batch]) -> Calls:
    import flashinfer

    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    calls: Calls = []
    for b in batches:
        heads, groups, needed = b.q.shape[1], b.keys.shape[2], -(-b.rows.lengths // BLOCK_SIZE)
        used = torch.arange(b.rows.tables.shape[1], device="cuda") < needed[:, None]
        indices = b.rows.tables[used]
        indptr = torch.cat((needed.new_zeros(1), needed.cumsum(0))).int()
        last = b.rows.lengths - (needed - 1) * BLOCK_SIZE
        types = {"q_data_type": b.q.dtype, "kv_data_type": b.keys.dtype}
        if b.rows.most_queries == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(indptr, indices, last, heads, groups, DIM, BLOCK_SIZE, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
            wrapper.plan(
                b.rows.starts, indptr, indices, last, heads, groups, DIM, BLOCK_SIZE, causal=True, **types
            )  # fmt: skip
        calls.append(partial(wrapper.run, b.q, (b.keys, b.values)))
    return calls


def torch_varlen(batches: list[Batch]) -> Calls:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    extra: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        extra["enable_gqa"] = True
    calls: Calls = []
    for b in batches:
        ends = b.rows.lengths.cumsum(0).int()
        k, v = (torch.cat(gathered(b, pool)) for pool in (b.keys, b.values))
        starts, most = torch.cat((ends.new_zeros(1), ends)), int(b.rows.lengths.max())
        calls.append(partial(varlen_attn, b.q, k, v, b.rows.starts, starts, b.rows.most_queries, most, **extra))
    return calls


def gathered(b: Batch, pool: Tensor) -> list[Tensor]:
    """Keys or values of each row, [length, G, D]."""
    lengths = b.rows.lengths.tolist()
    return [pool[table].flatten(0, 1)[:length] for table, length in zip(b.rows.tables, lengths, strict=True)]


def torch_sdpa(batches: list[Batch]) -> Calls:
    """Rows of equal shape that are all prompts, their keys and values copied out of the pages."""
    calls: Calls = []
    for b in batches:
        count, length = len(b.rows.lengths), b.rows.most_queries
        q, k, v = (
            x.view(count, length, -1, DIM).transpose(1, 2)
            for x in (b.q, *(torch.cat(gathered(b, pool)) for pool in (b.keys, b.values)))
        )
        calls.append(partial(_sdpa_call, q, k.contiguous(), v.contiguous()))
    return calls


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)


def flex_attention(batches: list[Batch]) -> Calls:
    """Rows of equal shape, copied into pages of 128 tokens."""
    from torch.nn.attention import flex_attention as flex

    page, calls, compiled = 128, [], torch.compile(flex.flex_attention, dynamic=False)

    def seen(numbers: Tensor, back: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return lambda row, head, query, key: numbers[row, key // page] * page + key % page <= query + back

    for b in batches:
        count, length, queries = len(b.rows.lengths), int(b.rows.lengths[0]), b.rows.most_queries
        pages, tiles = -(-length // page), -(-queries // page)
        order = torch.randperm(count * pages, device="cuda")
        tables = order.view(count, pages)
        k, v = (flex_pages(gathered(b, pool), page, order) for pool in (b.keys, b.values))
        # The number of each page of the pool in a row; that of a page of another row is out of sight.
        numbers = torch.full((count, count * pages), 2**20, device="cuda")
        numbers.scatter_(1, tables, torch.arange(pages, device="cuda").expand(count, -1))
        # Of the pages that a tile of queries sees, all but the last are seen whole.
        whole = torch.arange(pages - tiles, pages, device="cuda").expand(count, 1, -1)
        listed = pad(tables[:, None, None].expand(-1, 1, tiles, -1), (0, (count - 1) * pages))
        last = listed.gather(3, whole[..., None]).expand(-1, -1, -1, count * pages)
        mask = flex.BlockMask.from_kv_blocks(
            *(x.int().contiguous() for x in (torch.ones_like(whole), last, whole, listed)),
            BLOCK_SIZE=page,
            mask_mod=seen(numbers, length - queries),
            seq_lengths=(queries, count * pages * page),
        )
        q = b.q.view(count, queries, *b.q.shape[1:]).transpose(1, 2)
        k, v = (x.expand(count, -1, -1, -1) for x in (k, v))
        calls.append(partial(flex_call, compiled, q, k, v, mask))
    return calls


def flex_pages(rows: list[Tensor], page: int, order: Tensor) -> Tensor:
    """Rows [length, G, D] as a pool [1, G, tokens, D] in which page i of all of them is page order[i]."""
    pages = torch.cat([pad(x, (0, 0, 0, 0, 0, -len(x) % page)).unflatten(0, (-1, page)) for x in rows])
    return torch.empty_like(pages).index_copy_(0, order, pages).flatten(0, 1).transpose(0, 1)[None]


def flex_call(compiled: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    output: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1)
