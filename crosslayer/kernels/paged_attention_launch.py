"""How the Triton kernels of `paged_attention` are cut and launched."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2

from crosslayer.kernels.counters import counters
from crosslayer.kernels.dependent_launch_triton import dependent_launch
from crosslayer.kernels.paged_attention import AttentionRows
from crosslayer.kernels.paged_attention_triton import many_queries_kernel, one_query_kernel

# A program for a row of one query finds its row among all, looking at so many at a time: the first that is enough.
AT_A_TIME = (16, 128, 512)
# Of up to so many rows times key heads, the first keys are brought into the L2 cache ahead of time; more are in each
# other's way.
FETCHED = 16
# From so many to so many rows times key heads, so many bytes of what is read next are brought there too. Fewer rows
# are done too soon for that, and more leave the memory no time.
READ_AHEAD, AHEAD_BYTES = range(8, 129), 8 * 10**6


class Tiles(NamedTuple):
    """How a kernel is cut: queries times heads that share keys, keys at a time, and Triton's own two choices."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_of_many(share: int, padded: int, dtype: torch.dtype) -> Tiles:
    """For rows of many queries of heads of `padded` numbers, `share` of which share a key head."""
    least = next_power_of_2(share)
    if dtype == torch.float32:
        return Tiles(max(32, least), 32 if padded <= 128 else 16, 8, 2)
    if padded > 128:
        return Tiles(max(64, least), 32, 4 if least <= 64 else 8, 2)
    return Tiles(max(128, least), 64, 8, 3)


# How rows of one query are cut: up to so many of them times key heads, keys at a time, warps, stages, and about how
# many programs. The best of some on an H100, which has 132 processors: with up to 16 rows one program fills a
# processor; with more, there must be room for several, as lengths differ.
ONE_QUERY = ((4, 64, 8, 2, 128), (16, 128, 8, 3, 128), (64, 64, 8, 4, 192))


def tiles_of_one(
    num_tiles: int, share: int, padded: int, dtype: torch.dtype, *, fp8: bool = False
) -> tuple[Tiles, int]:
    """For rows of one query, `num_tiles` of them times key heads: enough keys under way at a time to hide how far it is
    to memory. And for about how many programs the keys are shared out."""
    rows, key_bytes = max(16, next_power_of_2(share)), padded * dtype.itemsize
    if rows > 32 or key_bytes > 512:
        return Tiles(rows, 64 if key_bytes <= 256 else 32, 8, 2), 128
    if key_bytes > 256:
        return Tiles(rows, 32, 4, 3), 128
    for most, keys, num_warps, num_stages, programs in ONE_QUERY:
        if num_tiles <= most:
            return Tiles(rows, keys, num_warps, num_stages), programs
    return (Tiles(rows, 128, 4, 2), 512) if fp8 else (Tiles(rows, 32, 4, 4), 256)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have: 227 KiB on a Hopper GPU, 99 on most that are not for servers."""
    if device.type != "cuda":
        return 2**30
    properties: Any = torch.cuda.get_device_properties(device)  # torch's types lack some
    return int(properties.shared_memory_per_block_optin)


def fitting(tiles: Tiles, share: int, q: Tensor, keys: Tensor, padded: int) -> Tiles:
    """Smaller, where a GPU has less shared memory than the one that the tiles were chosen on: first in stages, then in
    keys, then in rows, of which there are at least `share`."""

    def most_bytes(tiles: Tiles) -> int:
        queries_and_weights = tiles.rows * (padded + tiles.keys) * q.element_size()
        # One stage's keys and values are in registers.
        keys_and_values = (tiles.num_stages - 1) * 2 * tiles.keys * padded * keys.element_size()
        # Float32 is multiplied as two smaller numbers each.
        return (queries_and_weights + keys_and_values) * (2 if q.dtype == torch.float32 else 1)

    least = max(16, next_power_of_2(share))
    while most_bytes(tiles) > shared_memory(q.device):
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=tiles.num_stages - 1)
        elif tiles.keys > 16:
            tiles = tiles._replace(keys=tiles.keys // 2)
        elif tiles.rows > least:
            tiles = tiles._replace(rows=tiles.rows // 2)
        else:
            break
    return tiles


def launch_paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: AttentionRows,
    window: int | None,
    key_scale: float,
    value_scale: float,
    ahead: Tensor | None = None,
    *,
    many: Tiles | None = None,
    one: Tiles | None = None,
    programs: int | None = None,
) -> Tensor:
    """`paged_attention` cut in other ways than the usual, where given."""
    num_queries, heads, dim = q.shape
    block_size, groups = keys.shape[1:3]
    num_rows, share = len(rows.lengths), heads // groups
    output = q.new_empty(q.shape)
    padded = max(16, next_power_of_2(dim))
    scale = key_scale / (math.log(2) * dim**0.5)
    common = {"WINDOW": window or 0, "HEADS": heads, "DIM": dim, "PADDED": padded, "BLOCK_SIZE": block_size}
    common |= dependent_launch(q)
    if not num_rows:
        return output
    # Where all rows have equally many queries, and where all have one, nothing is left for the other kernel.
    if rows.most_queries > 1:
        many = many or fitting(tiles_of_many(share, padded, q.dtype), share, q, keys, padded)
        room = num_queries // (many.rows // share) + num_rows
        many_queries_kernel[(room, groups)](
            q, keys, values, output, rows.starts, rows.lengths, rows.tables, rows.firsts,
            num_rows, rows.tables.stride(0), q.stride(0), scale, value_scale, **common, GROUPS=groups,
            TILE_ROWS=many.rows, TILE_KEYS=many.keys, num_warps=many.num_warps, num_stages=many.num_stages,
        )  # fmt: skip
        if num_queries == num_rows * rows.most_queries:
            return output
    num_tiles = num_rows * groups
    usual = tiles_of_one(num_tiles, share, padded, q.dtype, fp8=keys.dtype.itemsize == 1)
    one, programs = one or fitting(usual[0], share, q, keys, padded), max(1, (programs or usual[1]) // groups)
    # One more for every row, as none works for two; but never more than there can be tiles.
    most = min(programs + num_rows, num_rows * -(-rows.tables.shape[1] * block_size // one.keys))
    sums = torch.empty(most * heads * dim, dtype=torch.float32, device=q.device)
    scores = torch.empty(most * heads, dtype=torch.float32, device=q.device)
    fetch = common["PDL"] and num_tiles <= FETCHED
    if not common["PDL"] or num_tiles not in READ_AHEAD:
        ahead = None
    ahead_bytes = 0 if ahead is None else min(AHEAD_BYTES, ahead.nbytes)
    # Where no row has one query, no program waits. Then the kernel must not begin early, nor end before the one above.
    common["launch_pdl"] &= rows.most_queries == 1
    at_a_time = next((number for number in AT_A_TIME if number >= num_rows), AT_A_TIME[-1])
    one_query_kernel[(most, groups)](
        q, keys, values, output, sums, scores, counters(q.device, num_tiles),
        rows.starts, rows.lengths, rows.tables, rows.firsts, num_rows, programs, rows.tables.stride(0), q.stride(0),
        scale, value_scale, ahead, ahead_bytes, **common, GROUPS=groups, TILE_ROWS=one.rows, TILE_KEYS=one.keys,
        AT_A_TIME=at_a_time, ALL_AT_ONCE=num_rows <= at_a_time, THREADS=32 * one.num_warps, FETCH=fetch,
        num_warps=one.num_warps, num_stages=one.num_stages,
    )  # fmt: skip
    return output
