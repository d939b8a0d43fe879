"""The Triton kernels of `paged_attention`.

The H/G query heads that share a key are rows of one matrix, so that with one key head a single query fills a tensor
core's 16 rows, and a key is read once for all of them. Rows with one query, whose time is the reading of their keys,
are split along the keys into parts of about the same size, a program for each, whatever the lengths of the rows; the
program of a row that is done last puts its parts together. The other rows are cut into tiles of queries. A batch with
both kinds takes both paths.

In the kernels a row's keys are counted from the first block it still has.
"""

import triton
import triton.language as tl

from crosslayer.kernels.counters_triton import arrives_last
from crosslayer.kernels.dependent_launch_triton import follow, let_next_begin, wait_for_previous

# The score of a key that may not be seen. It is finite, so that no -inf - -inf is a NaN: a query that has not seen any
# key yet collects nonsense with this maximum, and forgets it, times exp2(-1e30), with the first key it sees.
UNSEEN = tl.constexpr(-1e30)
# For float32: tensor cores, with what TF32 cuts off added in two more products.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _attend(
    q, keys, values, table, begin, end, positions, last, top, total, sums, group, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """Let q [M, D] at `positions` [M] see the keys from `begin` to `end`, of which there are those before `last`.

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
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
        if MASKED:
            distance = positions[:, None] - key[None, :]
            seen = distance >= 0
            if WINDOW:
                seen &= distance < WINDOW
            # Scaled before: UNSEEN * scale - higher in one instruction would keep the rounding error, itself huge.
            scores = tl.where(seen, scores, UNSEEN)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(q.dtype), v.to(q.dtype), sums * shrink[:, None], input_precision=PRECISION)
        top = higher
    return top, total, sums


# What changes from step to step must not compile a kernel anew: these numbers, and where these tensors begin in memory.
VARYING = ("num_rows", "table_stride")
ANYWHERE = ("starts", "lengths", "tables", "firsts")


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def many_queries_kernel(
    q, keys, values, output, starts, lengths, tables, firsts, num_rows, table_stride, q_stride, scale, value_scale,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some neighbouring queries of a row, with the heads of one key head. Rows of one query are left out."""
    follow(PDL)
    SHARE: tl.constexpr = HEADS // GROUPS
    QUERIES: tl.constexpr = TILE_ROWS // SHARE
    # Late tiles see the most keys; taken first, they do not keep the others waiting at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    # Row r has room for tiles from starts[r] // QUERIES + r on, which is enough, and one too many at most.
    row = -1
    for some in range(0, num_rows, 256):
        candidates = some + tl.arange(0, 256)
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
def _fetch(
    keys, values, table, begin, last, group,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """Bring the first tile of keys and values into the L2 cache. Nothing is read: what is written later counts."""
    LINE: tl.constexpr = 128 // (keys.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = PADDED // LINE if PADDED > LINE else 1
    key = tl.maximum(tl.minimum(begin + tl.arange(0, TILE_KEYS), last - 1), 0)
    block = tl.load(table + key // BLOCK_SIZE)
    offsets = ((block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE) * GROUPS + group) * DIM
    where = offsets[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, DIM - 1)[None, :]
    _prefetch((keys + where).to(tl.int64))
    _prefetch((values + where).to(tl.int64))


@triton.jit
def _read_ahead(ahead, ahead_bytes, program, programs, THREADS: tl.constexpr):
    """Bring a program's share of so many bytes from `ahead` on into the L2 cache, without waiting for any."""
    lines = ahead_bytes // 128
    for first in range(program * THREADS, lines, programs * THREADS):
        line = tl.minimum(first + tl.arange(0, THREADS), lines - 1)
        _prefetch(ahead.to(tl.int64) + line.to(tl.int64) * 128)


@triton.jit
def _prefetch(addresses):
    CODE: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(CODE, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _keys_of(rows, starts, lengths, firsts, num_rows, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """How many keys rows of one query see, counted from a row's first block: the first of them, and the end. And which
    of the rows there are."""
    there = rows < num_rows
    start = tl.load(starts + rows, mask=there, other=0)
    single = there & (tl.load(starts + rows + 1, mask=there, other=0) - start == 1)
    length = tl.load(lengths + rows, mask=single, other=0)
    end = tl.maximum(length - tl.load(firsts + rows, mask=single, other=0) * BLOCK_SIZE, 0)
    begin = tl.maximum(end - WINDOW, 0) if WINDOW else tl.zeros_like(end)
    return begin, end, single


@triton.jit
def _share_out(
    program, programs, starts, lengths, firsts, num_rows,
    WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, AT_A_TIME: tl.constexpr,
    ALL_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The row of one query that a program works for (`num_rows` or more if none), the first program that does, and how
    many keys each of them gets at most.

    That is about as many as if all keys were shared out evenly among `programs`, in whole tiles, but that none has keys
    of two rows. So there are at most as many more programs as rows.
    """
    rows = tl.arange(0, AT_A_TIME)
    begin, end, single = _keys_of(rows, starts, lengths, firsts, num_rows, WINDOW, BLOCK_SIZE)
    total = tl.sum(end - begin, 0)
    if not ALL_AT_ONCE:
        for some in range(AT_A_TIME, num_rows, AT_A_TIME):
            later_begin, later_end, _ = _keys_of(some + rows, starts, lengths, firsts, num_rows, WINDOW, BLOCK_SIZE)
            total += tl.sum(later_end - later_begin, 0)
    part = tl.maximum(tl.cdiv(tl.cdiv(total, programs), TILE_KEYS), 1) * TILE_KEYS
    last, used = _last_before(program, part, rows, begin, end, single, 0)
    if not ALL_AT_ONCE:
        for some in range(AT_A_TIME, num_rows, AT_A_TIME):
            later_begin, later_end, later_single = _keys_of(
                some + rows, starts, lengths, firsts, num_rows, WINDOW, BLOCK_SIZE
            )
            later, more = _last_before(program, part, some + rows, later_begin, later_end, later_single, used)
            last, used = tl.maximum(last, later), used + more
    return (last & 0xFFFFFFFF).to(tl.int32), (last >> 32).to(tl.int32), part


@triton.jit
def _last_before(program, part, rows, begin, end, single, before):
    """Of these rows the last that needs no program from `program` on: its number plus one, and above 32 bits how many
    programs there are up to it; `before` are those of other rows. And how many these rows need."""
    used = tl.where(single, tl.maximum(tl.cdiv(end - begin, part), 1), 0)
    ends = before + tl.cumsum(used, 0)
    ended = tl.where(ends <= program, (ends.to(tl.int64) << 32) + rows + 1, 0)
    return tl.max(ended, 0), tl.sum(used, 0)


@triton.jit
def _combine(
    partial_scores, partial_sums, used, place, heads, mine, inside, HEADS: tl.constexpr, DIM: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """The total and the sums, as `_attend` has them, of the first `used` parts of a row together.

    A part's score is that of a single key that would count as much as all of its own, its sums are their mean value.
    """
    top = tl.full(heads.shape, UNSEEN, tl.float32)
    total = tl.zeros(heads.shape, tl.float32)
    sums = tl.zeros(place.shape, tl.float32)
    for first in tl.range(0, used, AT_A_TIME):
        for offset in tl.static_range(AT_A_TIME):  # loads that do not wait for each other
            part = first + offset
            # Another processor has written them: not what may lie in this one's own cache.
            score = tl.load(partial_scores + part * HEADS + heads, mask=mine & (part < used), other=UNSEEN,
                            cache_modifier=".cg")  # fmt: skip
            value = tl.load(partial_sums + part * HEADS * DIM + place, mask=inside & (part < used), other=0.0,
                            cache_modifier=".cg")  # fmt: skip
            higher = tl.maximum(top, score)
            weight, shrink = tl.exp2(score - higher), tl.exp2(top - higher)
            total = total * shrink + weight
            sums = sums * shrink[:, None] + value * weight[:, None]
            top = higher
    return total, sums


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def one_query_kernel(
    q, keys, values, output, partial_sums, partial_scores, arrived, starts, lengths, tables, firsts, num_rows, programs,
    table_stride, q_stride, scale, value_scale, ahead, ahead_bytes,
    WINDOW: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_KEYS: tl.constexpr,
    AT_A_TIME: tl.constexpr, ALL_AT_ONCE: tl.constexpr, THREADS: tl.constexpr, FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some keys of a row of one query, with the heads of one key head. Other rows are left out.

    The program that is done last with its part of a row puts the parts together; `arrived` [rows, G] counts them, and
    is zeros before and after.
    """
    let_next_begin(PDL)
    SHARE: tl.constexpr = HEADS // GROUPS
    program, group = tl.program_id(0), tl.program_id(1)
    row, first, part = _share_out(
        program, programs, starts, lengths, firsts, num_rows, WINDOW, BLOCK_SIZE, TILE_KEYS, AT_A_TIME, ALL_AT_ONCE
    )
    if row >= num_rows:
        return
    token = tl.load(starts + row).to(tl.int64)
    begin, end, _ = _keys_of(row, starts, lengths, firsts, num_rows, WINDOW, BLOCK_SIZE)
    # All parts of a row alike, which may save one. There is one also of a row of length 0, and writes its output.
    part = tl.cdiv(tl.cdiv(end - begin, tl.maximum(tl.cdiv(end - begin, part), 1)), TILE_KEYS) * TILE_KEYS
    used = tl.maximum(tl.cdiv(end - begin, tl.maximum(part, 1)), 1)
    if program - first >= used:
        return
    begin += (program - first) * part
    last = tl.minimum(begin + part, end)
    table = tables + tl.cast(row, tl.int64) * table_stride
    if FETCH:  # while the kernels before still make the query and the newest key
        _fetch(keys, values, table, begin, last, group, GROUPS, DIM, PADDED, BLOCK_SIZE, TILE_KEYS)
    wait_for_previous(PDL)
    rows, dims = tl.arange(0, TILE_ROWS), tl.arange(0, PADDED)
    heads = group * SHARE + rows
    mine = rows < SHARE
    inside = mine[:, None] & (dims < DIM)[None, :]
    place = (heads * DIM)[:, None] + dims[None, :]
    q_tile = tl.load(q + token * q_stride + place, mask=inside, other=0.0)
    top, total, sums = _attend(
        q_tile, keys, values, table, begin, last,
        # All keys before the last one are seen.
        tl.zeros((TILE_ROWS,), tl.int32) + last - 1, last,
        tl.full((TILE_ROWS,), UNSEEN, tl.float32),
        tl.zeros((TILE_ROWS,), tl.float32),
        tl.zeros((TILE_ROWS, PADDED), tl.float32),
        group, scale, True, 0, GROUPS, DIM, BLOCK_SIZE, TILE_KEYS,
    )  # fmt: skip
    if ahead is not None:  # now that there are no more keys to read
        _read_ahead(ahead, ahead_bytes, group * programs + program, programs * GROUPS, THREADS)
    to = output + token * (HEADS * DIM) + place
    if used == 1:
        result = sums * tl.where(total > 0, value_scale / total, 0.0)[:, None]
        tl.store(to, result.to(output.dtype.element_ty), mask=inside)
    else:
        tl.store(partial_sums + program.to(tl.int64) * (HEADS * DIM) + place, sums / total[:, None], mask=inside)
        tl.store(partial_scores + program * HEADS + heads, top + tl.log2(total), mask=mine)
        if arrives_last(arrived + row * GROUPS + group, used):
            partial_sums += first.to(tl.int64) * (HEADS * DIM)
            partial_scores += first * HEADS
            total, sums = _combine(partial_scores, partial_sums, used, place, heads, mine, inside, HEADS, DIM, 4)
            tl.store(to, (sums * (value_scale / total)[:, None]).to(output.dtype.element_ty), mask=inside)
