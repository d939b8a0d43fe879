"""Causal attention of a flat batch over the blocks of a pool: rows of one query or of many, windows or none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# What the twin gathers at a time: little enough to stay in a CPU's cache, and not to be fetched from the system and
# cleared for every layer anew. Of 4,096 to 1,000,000 the least was the fastest, four times as fast as all at once.
KEYS_AT_A_TIME = 4096


class RowGroup(NamedTuple):
    """R rows that have n queries each, for the twin: `queries` [R, n] numbers their queries in the batch, `blocks`
    [R * B] their blocks, row by row, and `mask` [R, 1, n, B * block_size] is true where a query may look."""

    queries: Tensor
    blocks: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """R rows of a flat batch, each the last tokens of a sequence.

    Row r has the queries `starts[r]` to `starts[r + 1] - 1`, of which the last belongs to token `lengths[r] - 1` of its
    sequence. Its blocks are in `tables[r]`, from block number `firsts[r]` on: those before were dropped, as its windows
    have passed them. A row of length 0 sees nothing (it fills up a CUDA graph), and its output is zeros.

    Args:
        starts: int32 [R + 1], from 0 to the number of queries, or to fewer: what comes of the others is anything.
        lengths: int32 [R].
        tables: int32 [R, M], M at least 1; entry b is the block with tokens (firsts[r] + b) * block_size and on. Beyond
            what a row needs, entries are any block there is.
        firsts: int32 [R].
        most_queries: The largest number of queries of a row, known without asking the device.
    """

    starts: Tensor
    lengths: Tensor
    tables: Tensor
    firsts: Tensor
    most_queries: int
    _groups: dict[tuple[int, int | None], list[RowGroup]] = field(default_factory=dict, init=False, repr=False)

    def groups(self, block_size: int, window: int | None) -> list[RowGroup]:
        """The rows that see anything, in groups of equally many queries; worked out once, as all layers ask for it."""
        key = (block_size, window)
        if key not in self._groups:
            counts = self.starts.diff()
            found = self._groups[key] = []
            for count in sorted({*counts[self.lengths > 0].tolist()} - {0}):
                rows = ((counts == count) & (self.lengths > 0)).nonzero()[:, 0]
                # Rows of like lengths together, as they are filled up to the longest.
                lengths, order = self.lengths[rows].sort()
                longest = int(lengths[-1]) if window is None else min(int(lengths[-1]), window + count)
                for some in rows[order].split(max(1, KEYS_AT_A_TIME // longest)):
                    found.append(self._group(some, count, block_size, window))
        return self._groups[key]

    def _group(self, rows: Tensor, count: int, block_size: int, window: int | None) -> RowGroup:
        device = rows.device
        offsets = torch.arange(count, device=device)
        positions = (self.lengths[rows, None] - count + offsets).long()
        firsts = self.firsts[rows].long()
        # The entries of the table that the window reaches into.
        oldest = 0 if window is None else positions[:, 0] - window + 1
        begins = (oldest // block_size - firsts).clamp(min=0)
        ends = positions[:, -1] // block_size - firsts + 1
        columns = begins[:, None] + torch.arange(int((ends - begins).max()), device=device)
        keys = ((firsts[:, None] + columns) * block_size)[..., None] + torch.arange(block_size, device=device)
        distance = positions[:, :, None] - keys.flatten(1)[:, None, :]
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        blocks = self.tables[rows].long().gather(1, columns.clamp(max=self.tables.shape[1] - 1))
        return RowGroup(self.starts[rows, None].long() + offsets, blocks.flatten(), mask[:, None])


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: AttentionRows,
    *,
    window: int | None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    ahead: Tensor | None = None,
) -> Tensor:
    """Softmax(q kᵀ / √D) v for queries [N, H, D] that see the keys up to their own, at most window - 1 back.

    `keys` and `values` are contiguous pools [blocks, block_size, G, D], where G divides H and D is at most 256, in the
    type of `q` or in float8_e4m3fn, and hold keys and values divided by their scale. `q` is contiguous in its last
    dimension, the result [N, H, D] in all. `ahead` is a tensor that will be read next, as the weights of a layer are:
    a GPU may begin to fetch it.
    """
    if q.is_cuda and q.dtype != torch.float64:
        # Triton is there only where there is a GPU.
        from crosslayer.kernels.paged_attention_launch import launch_paged_attention

        return launch_paged_attention(q, keys, values, rows, window, key_scale, value_scale, ahead)
    return paged_attention_in_pytorch(q, keys, values, rows, window, key_scale, value_scale)


def paged_attention_in_pytorch(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: AttentionRows,
    window: int | None,
    key_scale: float,
    value_scale: float,
) -> Tensor:
    """What `paged_attention` says with nothing but gathers and SDPA, for any device and float type."""
    output = q.new_zeros(q.shape)
    heads, size = q.shape[1:]
    groups = keys.shape[2]
    for queries, blocks, mask in rows.groups(keys.shape[1], window):
        count = len(queries)
        # On a CPU, index_select of whole blocks is several times as fast as indexing.
        k, v = (pool.flatten(1).index_select(0, blocks).view(count, -1, groups, size) for pool in (keys, values))
        k, v = (gathered.transpose(1, 2).to(q.dtype) for gathered in (k, v))
        single = queries.shape[1] == 1  # the heads that share a key are then the queries of one matrix product
        q_rows = q[queries].view(count, groups, -1, size) if single else q[queries].transpose(1, 2)
        grouped = q_rows.shape[1] != groups
        out = scaled_dot_product_attention(
            q_rows, k, v, attn_mask=mask, scale=key_scale / size**0.5, enable_gqa=grouped
        )
        output[queries] = (out if single else out.transpose(1, 2)).reshape(*queries.shape, heads, size) * value_scale
    return output
