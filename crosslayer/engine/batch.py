"""A step's sequences as one flat batch of tensors, which reach the device in a single copy.

The new tokens of all sequences lie one after the other. Prompts and single tokens then share every matrix product
without padding, which is also the form in which attention kernels for ragged batches want it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from crosslayer.engine.scheduler import Scheduled
from crosslayer.kernels.paged_attention import AttentionRows
from crosslayer.model.paged import BlockTable, PagedCache

UNKNOWN = -1  # the id of a token that was drawn but not read yet, and the place of one that is not stored


class Shape(NamedTuple):
    """How many tokens and sequences a step of a fixed shape has, filled up.

    With as many of both, every sequence gains one token and has its logits asked for. With fewer sequences, some may
    gain more.
    """

    tokens: int
    rows: int

    @property
    def is_one_each(self) -> bool:
        return self.tokens == self.rows


class HostBatch(NamedTuple):
    """A batch on the host: its arrays by name, and the most tokens that a sequence gains."""

    arrays: dict[str, np.ndarray]
    most_new: int


@dataclass(frozen=True)
class Batch:
    """N new tokens of R sequences, of which n have their logits asked for.

    `ids` [N] are `UNKNOWN` where the token is the one last drawn in its slot; `slots` [N] says in which. `places[span]`
    [N] is where each token's keys and values go in the span's pools, counted in tokens; `rows[span]` is how the tokens
    look at them. `wanted` [n] numbers the tokens whose logits are asked for, None: all of them; `wanted_rows[span]` is
    how these look at the pools when they alone are left, and `drawing_slots` [n] are their slots. All tensors here are
    int64, on the device.
    """

    ids: Tensor
    slots: Tensor
    positions: Tensor
    places: Mapping[int, Tensor]
    rows: Mapping[int, AttentionRows]
    wanted: Tensor | None
    wanted_rows: Mapping[int, AttentionRows]
    drawing_slots: Tensor


class BatchBuilder:
    """Makes batches for a cache, and keeps the tables of up to `max_running` sequences from step to step.

    A slot beyond those is for what fills up a shape.
    """

    def __init__(self, cache: PagedCache, max_running: int) -> None:
        self.cache = cache
        self.filler_slot = max_running
        self._tables = {span: _Tables(max_running + 1) for span in sorted(set(cache.spans))}

    def on_host(self, step: Sequence[Scheduled], shape: Shape | None = None) -> HostBatch:
        """Describe a step. With a shape that is large enough for it, there are as many tokens, sequences and wanted
        logits as it says, and tables with room for any sequence: the shapes of all arrays depend on nothing else."""
        sequences = [item.sequence for item in step]
        slots = [sequence.slot for sequence in sequences]
        starts = np.array([sequence.num_cached for sequence in sequences], dtype=np.int64)
        new = np.array([item.new for item in step], dtype=np.int64)
        draws = [item.draws for item in step]
        ids: list[int] = []
        for item, start in zip(step, starts.tolist(), strict=True):
            tokens = item.sequence.tokens[start : start + item.new]
            ids += tokens
            if len(tokens) < item.new:
                ids.append(UNKNOWN)
        if shape is None:
            num_tokens, num_rows = len(ids), len(step)
            one_each, most_new = all(draws) and len(ids) == len(step), int(new.max())
        else:
            num_tokens, num_rows = shape
            one_each, most_new = shape.is_one_each, 1 if shape.is_one_each else num_tokens
        row_slots = np.array(slots + [self.filler_slot] * (num_rows - len(step)))
        ends = new.cumsum()
        row_of = np.arange(len(step)).repeat(new)
        positions = np.arange(len(ids)) - (ends - new - starts)[row_of]
        row_new = _filled(new, num_rows, int(one_each))
        lengths = _filled(starts + new, num_rows, 0).astype(np.int32)
        arrays = {
            "ids": _filled(np.array(ids, dtype=np.int64), num_tokens, 0),
            "slots": _filled(row_slots[row_of], num_tokens, self.filler_slot),
            "positions": _filled(positions, num_tokens, 0),
            "starts": np.concatenate(([0], row_new.cumsum())).astype(np.int32),
            "lengths": lengths,
        }
        wanted = None  # rows, unless all are
        if not one_each:
            asked = np.flatnonzero(draws)
            num_wanted = len(asked) if shape is None else num_rows
            wanted = _filled(asked, num_wanted, 0)
            arrays["wanted"] = _filled(ends[asked] - 1, num_wanted, 0)
            arrays["wanted slots"] = _filled(row_slots[asked], num_wanted, self.filler_slot)
            arrays["wanted starts"] = np.arange(num_wanted + 1, dtype=np.int32)
            arrays["wanted lengths"] = _filled(lengths[asked], num_wanted, 0)
        size = self.cache.block_size
        for span, tables in self._tables.items():
            tables.follow(slots, [sequence.tables[span] for sequence in sequences])
            table, firsts = tables.of(row_slots, None if shape is None else self.cache.blocks_of_row(span, most_new))
            blocks = table[row_of, positions // size - firsts[row_of]].astype(np.int64)
            places = _filled(blocks * size + positions % size, num_tokens, UNKNOWN)
            arrays |= {f"places {span}": places, f"firsts {span}": firsts, f"tables {span}": table}
            if wanted is not None:
                arrays |= {f"wanted firsts {span}": firsts[wanted], f"wanted tables {span}": table[wanted]}
        return HostBatch(arrays, most_new)

    def on_device(self, host: HostBatch, arrays: Mapping[str, Tensor]) -> Batch:
        """The batch, where its arrays are on the device already."""

        def rows(kind: str, most_queries: int) -> dict[int, AttentionRows]:
            return {
                span: AttentionRows(
                    arrays[f"{kind}starts"],
                    arrays[f"{kind}lengths"],
                    arrays[f"{kind}tables {span}"],
                    arrays[f"{kind}firsts {span}"],
                    most_queries,
                )
                for span in self._tables
            }

        all_rows, wanted = rows("", host.most_new), arrays.get("wanted")
        return Batch(
            ids=arrays["ids"],
            slots=arrays["slots"],
            positions=arrays["positions"],
            places={span: arrays[f"places {span}"] for span in self._tables},
            rows=all_rows,
            wanted=wanted,
            wanted_rows=all_rows if wanted is None else rows("wanted ", 1),
            drawing_slots=arrays["slots"] if wanted is None else arrays["wanted slots"],
        )


def _filled(array: np.ndarray, size: int, value: int) -> np.ndarray:
    missing = size - len(array)
    return np.concatenate((array, np.full(missing, value, dtype=array.dtype))) if missing else array


class _Tables:
    """The block tables of one span as a matrix with a row per slot, which follows the sequences' own lists."""

    def __init__(self, num_slots: int) -> None:
        self._blocks = np.zeros((num_slots, 1), dtype=np.int32)
        self._firsts = [0] * num_slots
        self._counts = [0] * num_slots
        self._seen: list[BlockTable | None] = [None] * num_slots

    def follow(self, slots: Sequence[int], tables: Sequence[BlockTable]) -> None:
        for slot, table in zip(slots, tables, strict=True):
            count = len(table.blocks)
            if self._seen[slot] is not table or self._firsts[slot] != table.first:
                self._seen[slot] = table
                self._firsts[slot], self._counts[slot] = table.first, 0
            if (old := self._counts[slot]) != count:
                if count > self._blocks.shape[1]:
                    self._blocks = np.pad(self._blocks, ((0, 0), (0, count)))
                self._blocks[slot, old:count] = table.blocks[old:]
                self._counts[slot] = count

    def of(self, slots: np.ndarray, width: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Block numbers [R, M] and first blocks [R] of some slots, M being as given or what the longest needs."""
        if width is None:
            width = max(self._counts[slot] for slot in slots.tolist())
        elif width > self._blocks.shape[1]:
            self._blocks = np.pad(self._blocks, ((0, 0), (0, width - self._blocks.shape[1])))
        firsts = np.array([self._firsts[slot] for slot in slots.tolist()], dtype=np.int32)
        return self._blocks[slots, :width], firsts
