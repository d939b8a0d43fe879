"""The Triton kernels of `few_rows`, and how they are launched.

A product of one row is as fast as its weights arrive. A program owns a few rows of the weight, and asks for all of them
at once, into registers: a multiprocessor holds some 100 KB that way, more than the 40 KB that must be under way for
the memory to be busy all the time.

Between two such kernels the memory would rest for some microseconds, as long as many of them run. So each lets the next
one start at once (programmatic dependent launch, `overlap`), which asks for its own weights, and only then waits
for the kernels before it. What makes that safe:

- A program that has passed `gdc_wait` sees all that the kernels before have written: the kernel before has ended, and
  that one ended after its own wait. So every kernel of such a chain has to wait, on every path.
- Before `gdc_wait`, a program reads only the weights, which no kernel of the chain writes, and writes nothing: a
  kernel before may still be reading what this one writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from crosslayer.kernels.dependent_launch_triton import can_overlap


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs."""

    rows: int
    """Rows of the weight that a program owns: a power of two, from 2."""
    num_warps: int
    """At least so many; more where a row is so long that their registers would not hold the program's rows."""
    overlap: bool = True
    """Start while the kernel before still runs, where the GPU can (compute capability 9.0 and above)."""
    evict_first: bool = True
    """Tell the caches that a weight will not be read again soon."""

    def options(self, x: Tensor) -> dict[str, int | bool | str]:
        """What kernels and Triton want to know for inputs x [N, K]."""
        count, columns = x.shape
        num_warps = self.num_warps
        while num_warps < 32 and self.rows * columns * x.element_size() > num_warps * 32 * BYTES_PER_THREAD:
            num_warps *= 2
        # Columns at a time: of each tile, every thread holds 16 bytes, which is its widest load.
        block = num_warps * 32 * 16 // x.element_size() // self.rows
        block = min(block, max(16, triton.next_power_of_2(columns)))
        overlap = self.overlap and can_overlap(x.device)
        options: dict[str, int | bool | str] = {
            "N": count,
            "K": columns,
            "ROWS": self.rows,
            "BLOCK": block,
            "OVERLAP": overlap,
        }
        options |= {"EVICT": "evict_first" if self.evict_first else "", "num_warps": num_warps}
        return options | ({"launch_pdl": True} if overlap else {})


# Of a thread's 255 registers of four bytes, what may be filled with weights.
BYTES_PER_THREAD = 384
# The best of those that benchmarks/few_rows.py tries, on an H100.
ROPE_STORE = Launch(rows=2, num_warps=4)
SWIGLU = Launch(rows=2, num_warps=2)
ADD = Launch(rows=4, num_warps=8)
LONG_ADD = Launch(rows=8, num_warps=4)  # where x is wider than 4096
LOGITS = Launch(rows=2, num_warps=4)


def project_rope_store(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *,
    head_dim: int, num_heads: int, num_kv_heads: int, bias: Tensor | None,
    keys: Tensor | None, values: Tensor | None, places: Tensor, key_scale: float, value_scale: float,
    launch: Launch = ROPE_STORE,
) -> Tensor:  # fmt: skip
    q = x.new_empty(len(x), num_heads, head_dim)
    pool = keys if keys is not None else values
    rope_store_kernel[(triton.cdiv(len(weight), launch.rows),)](
        x, weight, bias, cos, sin, q, keys, values, places, len(weight) // 2, eps, key_scale, value_scale,
        HEAD_DIM=head_dim, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads,
        LIMIT=None if pool is None else torch.finfo(pool.dtype).max, **launch.options(x),
    )  # fmt: skip
    return q


def project_swiglu(x: Tensor, weight: Tensor, eps: float, *, launch: Launch = SWIGLU) -> Tensor:
    size = len(weight) // 2
    out = x.new_empty(len(x), size)
    swiglu_kernel[(triton.cdiv(2 * size, launch.rows),)](x, weight, out, size, eps, **launch.options(x))
    return out


def project_add(x: Tensor, weight: Tensor, residual: Tensor, *, launch: Launch | None = None) -> None:
    size = len(weight)
    launch = launch or (ADD if x.shape[1] <= 4096 else LONG_ADD)
    add_kernel[(triton.cdiv(size, launch.rows),)](x, weight, residual, size, **launch.options(x))


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float, *, launch: Launch = LOGITS) -> Tensor:
    size = len(weight)
    out = torch.empty(len(x), size, dtype=torch.float32, device=x.device)
    logits_kernel[(triton.cdiv(size, launch.rows),)](x, weight, gain, out, size, eps, **launch.options(x))
    return out


@triton.jit  # type: ignore[untyped-decorator]
def rope_store_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, cos, sin, q, keys, values, places, num_pairs, eps, key_scale, value_scale,
    HEAD_DIM: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, LIMIT: tl.constexpr,
    EVICT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    # Half of a program's rows, and as far from each of them as rotation asks, the other half.
    pair = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), num_pairs - 1)
    row = pair // HALF * HEAD_DIM + pair % HALF + tl.arange(0, ROWS) // (ROWS // 2) * HALF
    tiles = _fetch_and_wait(weight, row, K, BLOCK, OVERLAP, EVICT)
    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    head, i = pair // HALF, pair % HALF
    exists = pair < num_pairs
    FIRST_VALUE: tl.constexpr = NUM_HEADS if keys is None else NUM_HEADS + NUM_KV_HEADS
    for n in tl.static_range(N):
        place = tl.load(places + n)
        c = tl.load(cos + n * HALF + i)
        s = tl.load(sin + n * HALF + i)
        total, norm = _multiply(tiles, x + n * K, None, eps, K, BLOCK)
        y = norm * total
        if bias is not None:
            y += tl.load(bias + row).to(tl.float32)
        first, second = _halves(y, ROWS)
        turns = head < FIRST_VALUE
        c = tl.where(turns, c, 1.0)
        s = tl.where(turns, s, 0.0)
        first, second = first * c - second * s, second * c + first * s
        _store_pair(q + (n * NUM_HEADS + head) * HEAD_DIM + i, first, second, exists & (head < NUM_HEADS), HALF, None)
        stored = exists & (place >= 0)
        if keys is not None:
            to = keys + (place * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM + i
            mine = stored & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
            _store_pair(to, first / key_scale, second / key_scale, mine, HALF, LIMIT)
        if values is not None:
            to = values + (place * NUM_KV_HEADS + head - FIRST_VALUE) * HEAD_DIM + i
            _store_pair(to, first / value_scale, second / value_scale, stored & (head >= FIRST_VALUE), HALF, LIMIT)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, size, eps, EVICT: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Half of a program's rows are the gate's, the other half the same of the up projection.
    row = tl.minimum(tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), size - 1)
    tiles = _fetch_and_wait(weight, row + tl.arange(0, ROWS) // (ROWS // 2) * size, K, BLOCK, OVERLAP, EVICT)
    row = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    for n in tl.static_range(N):
        total, norm = _multiply(tiles, x + n * K, None, eps, K, BLOCK)
        gate, up = _halves(norm * total, ROWS)
        y = gate * tl.sigmoid(gate) * up
        tl.store(out + n * size + row, y.to(out.dtype.element_ty), mask=row < size)


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(  # type: ignore[no-untyped-def]
    x, weight, residual, size, EVICT: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = _fetch_and_wait(weight, tl.minimum(row, size - 1), K, BLOCK, OVERLAP, EVICT)
    for n in tl.static_range(N):
        to = residual + n * size + row
        before = tl.load(to, mask=row < size).to(tl.float32)
        total, _ = _multiply(tiles, x + n * K, None, None, K, BLOCK)
        tl.store(to, (before + total).to(residual.dtype.element_ty), mask=row < size)


@triton.jit  # type: ignore[untyped-decorator]
def logits_kernel(  # type: ignore[no-untyped-def]
    x, weight, gain, out, size, eps, EVICT: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tiles = _fetch_and_wait(weight, tl.minimum(row, size - 1), K, BLOCK, OVERLAP, EVICT)
    for n in tl.static_range(N):
        total, norm = _multiply(tiles, x + n * K, gain, eps, K, BLOCK)
        tl.store(out + n * size + row, norm * total, mask=row < size)


@triton.jit  # type: ignore[untyped-decorator]
def _fetch_and_wait(  # type: ignore[no-untyped-def]
    weight, row, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr, EVICT: tl.constexpr
):
    """The rows `row` [ROWS] of the weight as tiles [ROWS, BLOCK], and the end of the kernels before."""
    if OVERLAP:
        gdc_launch_dependents()
    weight += row.to(tl.int64)[:, None] * K
    tiles = ()
    for first in tl.static_range(0, K, BLOCK):
        tiles = tiles + (_load_tile(weight, first, K, BLOCK, EVICT),)  # type: ignore[assignment]  # noqa: RUF005
    if OVERLAP:
        gdc_wait()
    return tiles


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(tiles, x, gain, eps, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products [ROWS] of the tiles with x [K], times gain [K] if there is one; 1/RMS of x [ROWS], if there is an eps.

    x is read as if each row had one of its own: that is just what each warp needs to multiply its rows without a word
    from the others.
    """
    ROWS: tl.constexpr = tiles[0].shape[0]
    # What a thread holds of a row is summed at once, so that only the sums have to be kept.
    WIDE: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    rows = tl.zeros((ROWS, 1), tl.int32)
    total = tl.zeros((ROWS, BLOCK // WIDE), tl.float32)
    squares = tl.zeros((ROWS, BLOCK // WIDE), tl.float32)
    for step in tl.static_range(len(tiles)):
        part = _load_tile(x + rows, step * BLOCK, K, BLOCK, "").to(tl.float32)
        if eps is not None:
            squares += tl.sum(tl.reshape(part * part, (ROWS, BLOCK // WIDE, WIDE)), 2)
        if gain is not None:
            part *= _load_tile(gain + rows, step * BLOCK, K, BLOCK, "").to(tl.float32)
        total += tl.sum(tl.reshape(tiles[step].to(tl.float32) * part, (ROWS, BLOCK // WIDE, WIDE)), 2)
    norm = 1.0
    if eps is not None:
        norm = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    return tl.sum(total, 1), norm


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(rows, first: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns `first` and on of the rows that pointers [ROWS, 1] begin, zeros beyond K."""
    column = first + tl.arange(0, BLOCK)[None, :]
    if first + BLOCK <= K:  # a load without a mask is a wide one, whatever K
        return tl.load(rows + column, eviction_policy=EVICT)
    return tl.load(rows + column, mask=column < K, other=0.0, eviction_policy=EVICT)


@triton.jit  # type: ignore[untyped-decorator]
def _halves(y, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the second half of y [ROWS]."""
    return tl.split(tl.trans(tl.reshape(y, (2, ROWS // 2))))


@triton.jit  # type: ignore[untyped-decorator]
def _store_pair(to, first, second, mask, HALF: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Components i and i + D/2, kept within the limit: the conversion alone may make NaN of what is too large."""
    if LIMIT is not None:
        first = tl.clamp(first, -LIMIT, LIMIT, tl.PropagateNan.ALL)
        second = tl.clamp(second, -LIMIT, LIMIT, tl.PropagateNan.ALL)
    tl.store(to, first.to(to.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(to.dtype.element_ty), mask=mask)
