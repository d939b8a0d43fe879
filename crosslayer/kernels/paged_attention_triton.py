"""The Triton kernels of `paged_attention`.

The H/G query heads that share a key are rows of one matrix, so that with one key head a single query fills a tensor
core's 16 rows, and a key is read once for all of them. Rows with one query, whose time is the reading of their keys,
are split along the keys over many programs, whose results a second kernel combines. The other rows are cut into tiles
of queries. A batch with both kinds takes both paths.

In the kernels a row's keys are counted from the first block it still has.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow
from crosslayer.kernels.paged_attention import AttentionRows

# The score of a key that may not be seen. It is finite, so that no -inf - -inf is a NaN: a query that has not seen any
# key yet collects nonsense with this maximum, and forgets it, times exp2(-1e30), with the first key it sees.
UNSEEN = tl.constexpr(-1e30)
# For float32: tensor cores, with what TF32 cuts off added in two more products.
PRECISION = tl.constexpr("tf32x3")
LOG2_E = 1.4426950408889634
# Rows of one query are split so that there are about two programs for each of an H100's 132 processors.
PROGRAMS, MOST_SPLITS = 264, 64


class Tiles(NamedTuple):
    """How a kernel is cut: queries times heads that share keys, keys at a time, and Triton's own two choices."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit
def _attend(
    q,
    keys,
    values,
    table,
    begin,
    end,
    positions,
    last,
    top,
    total,
    sums,
    group,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """Let q [M, D] at `positions` [M] see the keys from `follow` to `end`, of which there are those before `last`.

    `top`, `total` [M] and `sums` [M, D]: the highest score so far, in powers of two, and the sums of exp2(score - top)
    alone and times the values.
    """
    PADDED: tl.constexpr = q.shape[1]
    dims, keys_ahead = tl.arange(0, PADDED), tl.arange(0, TILE_KEYS)
    # The table is read a tile ahead, so that the loads of keys never wait for it, and the compiler sees that.
    block = tl.load(table + (begin + keys_ahead) // BLOCK_SIZE, mask=begin + keys_ahead < last, other=0)
    for start in tl.range(begin, end, TILE_KEYS):
        key = start + keys_ahead
        there = key < last
        offsets = ((block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * GROUPS + group) * DIM
        where = offsets[:, None] + dims[None, :]
        ahead = key + TILE_KEYS
        block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < last, other=0)
        if MASKED or PADDED != DIM:
            inside = there[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + where, mask=inside, other=0.0)
            v = tl.load(values + where, mask=inside, other=0.0)
        else:
            k = tl.load(keys + where)
            v = tl.load(values + where)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if MASKED:
            distance = positions[:, None] - key[None, :]
            seen = distance >= 0
            if WINDOW:
                seen &= distance < WINDOW
            scores = tl.where(seen, scores, UNSEEN)
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * shrink[:, None], input_precision=PRECISION)
        top = higher
    return top, total, sums


# What changes from step to step must not compile a kernel anew.
_VARYING = ("num_rows", "table_stride")
_ANYWHERE = ("starts", "lengths", "tables", "firsts")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_ANYWHERE)
def many_queries_kernel(
    q,
    keys,
    values,
    output,
    starts,
    lengths,
    tables,
    firsts,
    num_rows,
    table_stride,
    q_stride,
    scale,
    value_scale,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some neighbouring queries of a row, with the heads of one key head. Rows of one query are left out."""
    follow(PDL)
    SHARE: tl.constexpr = HEADS // GROUPS
    QUERIES: tl.constexpr = TILE_ROWS // SHARE
    # Late tiles see the most keys; taken first, they do not keep the others waiting at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    # Row r has room for tiles from starts[r] // QUERIES + r on, which is enough, and one too many at most.
    row = -1
    for begin in range(0, num_rows, 256):
        candidates = begin + tl.arange(0, 256)
        there = candidates < num_rows
        room = tl.load(starts + candidates, mask=there, other=0) // QUERIES + candidates
        row += tl.sum((there & (room <= tile)).to(tl.int32), 0)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    first = (tile - (start // QUERIES + row)) * QUERIES
    if (count == 1) | (first >= count):
        return
    length = tl.load(lengths + row) - tl.load(firsts + row) * BLOCK_SIZE
    table = tables + tl.cast(row, tl.int64) * table_stride

    rows = tl.arange(0, TILE_ROWS)
    queries = first + rows // SHARE
    heads = group * SHARE + rows % SHARE
    dims = tl.arange(0, PADDED)
    inside = ((rows < QUERIES * SHARE) & (queries < count))[:, None] & (dims < DIM)[None, :]
    tokens = (start + queries).to(tl.int64)
    q_tile = tl.load(q + (tokens * q_stride + heads * DIM)[:, None] + dims[None, :], mask=inside, other=0.0)

    positions = length - count + queries
    lowest = length - count + first
    end = tl.minimum(lowest + QUERIES, length)
    # What all queries of the tile see, in whole tiles of keys, needs no mask.
    begin = 0
    whole_end = tl.maximum(lowest + 1, 0) // TILE_KEYS * TILE_KEYS
    top = tl.full((TILE_ROWS,), UNSEEN, tl.float32)
    total = tl.zeros((TILE_ROWS,), tl.float32)
    sums = tl.zeros((TILE_ROWS, PADDED), tl.float32)
    if WINDOW:
        whole_begin = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), TILE_KEYS) * TILE_KEYS, whole_end)
        begin = tl.maximum(lowest - WINDOW + 1, 0) // TILE_KEYS * TILE_KEYS
        top, total, sums = _attend(
            q_tile, keys, values, table, begin, whole_begin, positions, end, top, total, sums, group, scale,
            True, WINDOW, GROUPS, DIM, BLOCK_SIZE, TILE_KEYS,
        )  # fmt: skip
        begin = whole_begin
    top, total, sums = _attend(
        q_tile, keys, values, table, begin, whole_end, positions, end, top, total, sums, group, scale,
        False, WINDOW, GROUPS, DIM, BLOCK_SIZE, TILE_KEYS,
    )  # fmt: skip
    top, total, sums = _attend(
        q_tile, keys, values, table, whole_end, end, positions, end, top, total, sums, group, scale,
        True, WINDOW, GROUPS, DIM, BLOCK_SIZE, TILE_KEYS,
    )  # fmt: skip
    result = sums * tl.where(total > 0, value_scale / total, 0.0)[:, None]
    target = output + (tokens * (HEADS * DIM) + heads * DIM)[:, None] + dims[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _split(
    length, first, SPLITS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr
):
    """The keys that the last token of a row sees, from and to, and how many of them a split gets."""
    end = tl.maximum(length - first * BLOCK_SIZE, 0)
    begin = tl.maximum(end - WINDOW, 0) if WINDOW else 0
    return begin, end, tl.cdiv(tl.cdiv(end - begin, TILE_KEYS), SPLITS) * TILE_KEYS


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=_ANYWHERE)
def one_query_kernel(
    q,
    keys,
    values,
    output,
    partial_sums,
    partial_scores,
    starts,
    lengths,
    tables,
    firsts,
    table_stride,
    q_stride,
    scale,
    value_scale,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some keys of a row of one query, with the heads of one key head; with one split, all keys and the output."""
    follow(PDL)
    SHARE: tl.constexpr = HEADS // GROUPS
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(starts + row).to(tl.int64)
    if tl.load(starts + row + 1) - token != 1:
        return
    begin, end, part = _split(
        tl.load(lengths + row), tl.load(firsts + row), SPLITS, WINDOW, BLOCK_SIZE, TILE_KEYS
    )  # fmt: skip
    begin += split * part
    if SPLITS > 1 and begin >= end:
        return
    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, PADDED)
    heads = group * SHARE + rows
    inside = (rows < SHARE)[:, None] & (dims < DIM)[None, :]
    place = (heads * DIM)[:, None] + dims[None, :]
    q_tile = tl.load(q + token * q_stride + place, mask=inside, other=0.0)
    last = tl.minimum(begin + part, end)
    top, total, sums = _attend(
        q_tile, keys, values, tables + tl.cast(row, tl.int64) * table_stride, begin, last,
        # All keys before the last one are seen.
        tl.zeros((TILE_ROWS,), tl.int32) + last - 1, last,
        tl.full((TILE_ROWS,), UNSEEN, tl.float32),
        tl.zeros((TILE_ROWS,), tl.float32),
        tl.zeros((TILE_ROWS, PADDED), tl.float32),
        group, scale, True, 0, GROUPS, DIM, BLOCK_SIZE, TILE_KEYS,
    )  # fmt: skip
    if SPLITS == 1:
        result = sums * tl.where(total > 0, value_scale / total, 0.0)[:, None]
        tl.store(output + token * (HEADS * DIM) + place, result.to(output.dtype.element_ty), mask=inside)
    else:
        partial = (row.to(tl.int64) * SPLITS + split) * HEADS
        tl.store(partial_sums + partial * DIM + place, sums / total[:, None], mask=inside)
        tl.store(partial_scores + partial + heads, top + tl.log2(total), mask=rows < SHARE)


@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def combine_kernel(
    output,
    partial_sums,
    partial_scores,
    starts,
    lengths,
    firsts,
    value_scale,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of a row of one query: the splits' results, weighted by exp2 of what they have for scores."""
    follow(PDL)
    row, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(starts + row).to(tl.int64)
    if tl.load(starts + row + 1) - token != 1:
        return
    begin, end, part = _split(
        tl.load(lengths + row), tl.load(firsts + row), SPLITS, WINDOW, BLOCK_SIZE, TILE_KEYS
    )  # fmt: skip
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    used = begin + splits * part < end
    partial = (row.to(tl.int64) * SPLITS + splits) * HEADS + head
    scores = tl.load(partial_scores + partial, mask=used, other=UNSEEN)
    weights = tl.where(used, tl.exp2(scores - tl.max(scores, 0)), 0.0)
    inside = used[:, None] & (dims < DIM)[None, :]
    sums = tl.load(partial_sums + partial[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(sums * weights[:, None], 0) * tl.where(total > 0, value_scale / total, 0.0)
    target = output + (token * HEADS + head) * DIM + dims
    tl.store(target, result.to(output.dtype.element_ty), mask=dims < DIM)


def tiles_of_many(share: int, padded: int, dtype: torch.dtype) -> Tiles:
    """For rows of many queries of heads of `padded` numbers, `share` of which share a key head."""
    least = triton.next_power_of_2(share)
    if dtype == torch.float32:
        return Tiles(max(32, least), 32 if padded <= 128 else 16, 8, 2)
    if padded > 128:
        return Tiles(max(64, least), 32, 4 if least <= 64 else 8, 2)
    return Tiles(max(128, least), 64, 8, 3)


def tiles_of_one(share: int, padded: int, dtype: torch.dtype) -> Tiles:
    """For rows of one query: enough keys under way at a time to hide how far it is to memory."""
    rows, key_bytes = max(16, triton.next_power_of_2(share)), padded * dtype.itemsize
    small = rows <= 32 and key_bytes <= 512
    return Tiles(rows, 64 if key_bytes <= 256 else 32, 4 if small else 8, 3 if small else 2)


def splits_of(num_rows: int, groups: int) -> int:
    """Into how many parts the keys of a row of one query are split, a power of two."""
    return min(MOST_SPLITS, 1 << max(0, (PROGRAMS // max(1, num_rows * groups)).bit_length() - 1))


def launch_paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: AttentionRows,
    window: int | None,
    key_scale: float,
    value_scale: float,
    *,
    many: Tiles | None = None,
    one: Tiles | None = None,
    splits: int | None = None,
) -> Tensor:
    """`paged_attention` cut in other ways than the usual, where given."""
    num_queries, heads, dim = q.shape
    block_size, groups = keys.shape[1:3]
    num_rows, share = len(rows.lengths), heads // groups
    output = q.new_empty(q.shape)
    padded = max(16, triton.next_power_of_2(dim))
    scale = key_scale * LOG2_E / dim**0.5
    common = {"WINDOW": window or 0, "HEADS": heads, "DIM": dim, "PADDED": padded, "BLOCK_SIZE": block_size}
    common |= dependent_launch(q)
    if not num_rows:
        return output
    # Where all rows have equally many queries, and where all have one, nothing is left for the other kernel.
    if rows.most_queries > 1:
        many = many or tiles_of_many(share, padded, q.dtype)
        room = num_queries // (many.rows // share) + num_rows
        many_queries_kernel[(room, groups)](
            q, keys, values, output, rows.starts, rows.lengths, rows.tables, rows.firsts,
            num_rows, rows.tables.stride(0), q.stride(0), scale, value_scale, **common, GROUPS=groups,
            TILE_ROWS=many.rows, TILE_KEYS=many.keys, num_warps=many.num_warps, num_stages=many.num_stages,
        )  # fmt: skip
        if num_queries == num_rows * rows.most_queries:
            return output
    one = one or tiles_of_one(share, padded, q.dtype)
    splits = splits or splits_of(num_rows, groups)
    split = {"TILE_KEYS": one.keys, "SPLITS": splits}
    partials = num_rows * heads * splits if splits > 1 else 0
    sums = torch.empty(partials * dim, dtype=torch.float32, device=q.device)
    scores = torch.empty(partials, dtype=torch.float32, device=q.device)
    one_query_kernel[(num_rows, groups, splits)](
        q, keys, values, output, sums, scores, rows.starts, rows.lengths, rows.tables, rows.firsts,
        rows.tables.stride(0), q.stride(0), scale, value_scale, **common, GROUPS=groups, TILE_ROWS=one.rows,
        num_warps=one.num_warps, num_stages=one.num_stages, **split,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(num_rows, heads)](
            output, sums, scores, rows.starts, rows.lengths, rows.firsts, value_scale, **common, **split, num_warps=4
        )  # fmt: skip
    return output
