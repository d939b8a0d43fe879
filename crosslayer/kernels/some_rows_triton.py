"""The Triton kernels of `project` for some rows: a product on tensor cores, and what follows it, at once.

A product of up to some 64 rows takes as long as its weight takes to arrive, as one of a single row does, but it needs
tensor cores. A program owns some rows of the weight, which are the first operand, and a part of their columns; the
tokens are the second. The program that is done last with a tile puts its parts together, always in the same order.

Each kernel lets the next one begin at once (see `dependent_launch_triton`), which asks for the begin of its own weight
as soon as a processor has room for it, and only then waits for the kernels before it.
"""

import triton
import triton.language as tl

from crosslayer.kernels.counters_triton import arrives_last
from crosslayer.kernels.dependent_launch_triton import let_next_begin, wait_for_previous
from crosslayer.kernels.rope_store_triton import store_new, store_pair


# How many tokens there are must not compile a kernel anew.
@triton.jit(do_not_specialize=["count"])
def rope_store_kernel(
    x, weight, bias, cos, sin, q, keys, values, places, parts, arrived, num_pairs, count, eps, key_scale, value_scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, KEY_LIMIT: tl.constexpr, VALUE_LIMIT: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = DIM // 2
    # Half of a program's rows, and as far from each of them as rotation asks, the other half.
    pair = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), num_pairs - 1)
    row = pair // HALF * DIM + pair % HALF + tl.arange(0, ROWS) // (ROWS // 2) * HALF
    y, squares, last = _multiply(x, weight, row, parts, arrived, count, True, K, TOKENS, ROWS, BLOCK, SPLITS, HELD, PDL)
    if last:
        y *= tl.rsqrt(squares / K + eps)[None, :]
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)[:, None]
        first, second = _halves(y)
        own = (tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2))[:, None]
        head, i = own // HALF, own % HALF
        token = tl.arange(0, TOKENS)[None, :]
        exists = (own < num_pairs) & (token < count)
        FIRST_VALUE: tl.constexpr = HEADS if keys is None else HEADS + GROUPS
        turns = exists & (head < FIRST_VALUE)
        c = tl.load(cos + token * HALF + i, mask=turns, other=1.0)
        s = tl.load(sin + token * HALF + i, mask=turns, other=0.0)
        first, second = first * c - second * s, second * c + first * s
        store_pair(q + (token * HEADS + head) * DIM + i, first, second, exists & (head < HEADS), HALF, None)
        place = tl.load(places + token, mask=token < count, other=-1)
        store_new(
            first, second, head, i, place, exists, keys, values, key_scale, value_scale,
            HEADS, GROUPS, DIM, KEY_LIMIT, VALUE_LIMIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def swiglu_kernel(
    x, weight, output, parts, arrived, size, count, eps,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Half of a program's rows are the gate's, the other half the same of the up projection.
    row = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), size - 1)
    row += tl.arange(0, ROWS) // (ROWS // 2) * size
    y, squares, last = _multiply(x, weight, row, parts, arrived, count, True, K, TOKENS, ROWS, BLOCK, SPLITS, HELD, PDL)
    if last:
        gate, up = _halves(y * tl.rsqrt(squares / K + eps)[None, :])
        own = (tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2))[:, None]
        token = tl.arange(0, TOKENS)[None, :]
        made = (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty)
        tl.store(output + token * size + own, made, mask=(own < size) & (token < count))


@triton.jit(do_not_specialize=["count"])
def add_kernel(
    x, weight, residual, parts, arrived, size, count,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y, _, last = _multiply(
        x, weight, tl.minimum(row, size - 1), parts, arrived, count, False,
        K, TOKENS, ROWS, BLOCK, SPLITS, HELD, PDL,
    )  # fmt: skip
    if last:
        token = tl.arange(0, TOKENS)[None, :]
        inside = (row[:, None] < size) & (token < count)
        to = residual + token * size + row[:, None]
        y += tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(to, y.to(residual.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(
    x, weight, row, parts, arrived, count, SQUARES: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, TOKENS] of the rows `row` of the weight with x [count, K], sums of squares [TOKENS] of x, and
    whether this program is the one that has them; the others of the tile have but their part.

    `parts` [tiles, SPLITS, ROWS + 1, TOKENS] is room for the parts; `arrived` [tiles] counts them, and is zeros before
    and after.
    """
    let_next_begin(PDL)
    STEPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    tile, split = tl.program_id(0), tl.program_id(1)
    begin, end = split * STEPS // SPLITS * BLOCK, (split + 1) * STEPS // SPLITS * BLOCK
    weight += row.to(tl.int64)[:, None] * K
    token = tl.arange(0, TOKENS)
    x += token.to(tl.int64)[:, None] * K
    there = token[:, None] < count
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK // 8), tl.float32)
    if HELD:
        held = _load_weight(weight, begin, HELD, K % BLOCK != 0, K)
    wait_for_previous(PDL)
    if HELD:
        wide = _load_tokens(x, there, begin, HELD, K % BLOCK != 0, K)
        total = tl.dot(held, tl.trans(wide), total)
        if SQUARES:
            squares += tl.sum(tl.reshape(_squares(wide), (TOKENS, HELD // BLOCK, BLOCK // 8)), 1)
    if HELD * SPLITS < STEPS * BLOCK:
        for first in tl.range(begin + HELD, end, BLOCK):
            w = _load_weight(weight, first, BLOCK, K % BLOCK != 0, K)
            some = _load_tokens(x, there, first, BLOCK, K % BLOCK != 0, K)
            total = tl.dot(w, tl.trans(some), total)
            if SQUARES:
                squares += _squares(some)
    sums = tl.sum(squares, 1)
    last = True
    if SPLITS > 1:
        PART: tl.constexpr = (ROWS + 1) * TOKENS
        place = tl.arange(0, ROWS)[:, None] * TOKENS + token[None, :]
        parts += tile.to(tl.int64) * (SPLITS * PART)
        tl.store(parts + split * PART + place, total)
        if SQUARES:
            tl.store(parts + split * PART + ROWS * TOKENS + token, sums)
        last = arrives_last(arrived + tile, SPLITS)
        if last:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            sums = tl.zeros((TOKENS,), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(parts + part * PART + place, cache_modifier=".cg")
                if SQUARES:
                    sums += tl.load(parts + part * PART + ROWS * TOKENS + token, cache_modifier=".cg")
    return total, sums, last


@triton.jit
def _load_weight(rows, first, COLUMNS: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr):
    """Columns `first` and on of the rows that pointers [ROWS, 1] begin, zeros beyond K."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    if not MASKED:
        return tl.load(rows + column, eviction_policy="evict_first")
    return tl.load(rows + column, mask=column < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_tokens(rows, there, first, COLUMNS: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr):
    """The same of tokens, and zeros where there are none: any token instead would be read by all programs at once."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    if MASKED:
        there = there & (column < K)
    return tl.load(rows + column, mask=there, other=0.0)


@triton.jit
def _squares(some):
    """Sums of the squares of eight neighbours [TOKENS, COLUMNS // 8]: what a thread has at hand."""
    exact = some.to(tl.float32)
    return tl.sum(tl.reshape(exact * exact, (some.shape[0], some.shape[1] // 8, 8)), 2)


@triton.jit
def _halves(y):
    """The first and the second half of the rows of y."""
    ROWS: tl.constexpr = y.shape[0]
    return tl.split(tl.permute(tl.reshape(y, (2, ROWS // 2, y.shape[1])), (1, 2, 0)))
