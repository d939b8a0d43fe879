"""A key/value cache in blocks: one pool per slot, and tables that say which blocks a sequence holds.

Slots that are kept for equally many tokens (all those without a window, or those with the same one) share their block
numbers: block b of such a *span* is block b in the pool of each of its slots. So a sequence needs one table per span,
no matter how many layers there are, and a layer finds its keys and its values by the same table, whoever owns them.

A batch is flat: the new tokens of all sequences one after the other, in one row. Prompts and single tokens then share
every matrix product without padding, which is also the form in which attention kernels for ragged batches want it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model.attention import PagedMask, PagedRows, positional_mask
from crosslayer.model.cache import CacheStep, slot_capacities
from crosslayer.plan import ModelConfig


@dataclass
class BlockTable:
    """The blocks of one sequence in one span: those of its tokens from block number `first` on, oldest first."""

    first: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The number of the block after the last one held."""
        return self.first + len(self.blocks)


@dataclass(frozen=True)
class PagedRow:
    """The `new` tokens that a sequence gains from position `start` on, and its table in each span.

    Its tables must have blocks for these tokens and for all that they may look at. `wanted`: the hidden state of the
    last new token is asked for.
    """

    start: int
    new: int
    tables: Mapping[int, BlockTable]
    wanted: bool


class SlotScales(NamedTuple):
    """Per owner, the power of two that its keys or values are divided by before they are stored (see `fp8`)."""

    keys: Mapping[int, float]
    values: Mapping[int, float]


class PagedCache:
    """Pools of blocks of `block_size` tokens for sequences of up to `max_length` tokens.

    `spans[layer]` is for how many tokens of a sequence the layer's keys and values are kept: `max_length`, or a window
    that is shorter. `num_blocks` says how many blocks each span has. `keys[owner]` and `values[owner]` are
    [num_blocks, block_size, G, D] and hold keys and values divided by their slot's scale (default 1), clipped to what
    `dtype` can say.

    Raises:
        UserError: a layer reads keys and values that are kept for different numbers of tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: Mapping[int, int],
        block_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scales: SlotScales | None = None,
    ) -> None:
        plan = config.plan
        self.plan, self.block_size, self.max_length = plan, block_size, max_length
        self.num_blocks = dict(num_blocks)
        self.spans = slot_capacities(plan, max_length)
        self.device = torch.device(device)

        def pool(owner: int) -> Tensor:
            # Zeros, not empty: a masked entry still meets its zero weight, and 0 times a stray NaN is NaN.
            shape = (num_blocks[self.spans[owner]], block_size, config.num_key_value_heads, config.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = {owner: pool(owner) for owner in plan.key_slots}
        self.values = {owner: pool(owner) for owner in plan.value_slots}
        self.scales = scales or SlotScales(dict.fromkeys(plan.key_slots, 1.0), dict.fromkeys(plan.value_slots, 1.0))

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(pool.nbytes for pool in (*self.keys.values(), *self.values.values()))

    def begin(self, rows: Sequence[PagedRow]) -> PagedStep:
        """Prepare a forward pass over the rows' new tokens, laid one after the other in a batch [1, N]."""
        return PagedStep(self, rows)


def slots_of_spans(config: ModelConfig, max_length: int) -> dict[int, int]:
    """How many slots (streams of keys or of values) each span has, the longest span first.

    Raises:
        UserError: a layer reads keys and values that are kept for different numbers of tokens.
    """
    slot_capacities(config.plan, max_length)
    capacities = [slot.capacity(max_length) for slot in config.plan.slots]
    return {span: capacities.count(span) for span in sorted(set(capacities), reverse=True)}


def blocks_of_sequence(config: ModelConfig, block_size: int, max_length: int) -> dict[int, int]:
    """How many blocks of each span a sequence of `max_length` tokens holds.

    Raises:
        UserError: as `slots_of_spans`.
    """
    # A window that starts inside a block reaches into one block more.
    return {span: -(-span // block_size) + (span < max_length) for span in slots_of_spans(config, max_length)}


def sequence_bytes(config: ModelConfig, block_size: int, max_length: int, dtype: torch.dtype) -> int:
    """Bytes of the blocks that a sequence of `max_length` tokens holds."""
    slots = slots_of_spans(config, max_length)
    blocks = sum(slots[span] * count for span, count in blocks_of_sequence(config, block_size, max_length).items())
    return blocks * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def divide_memory(
    config: ModelConfig, nbytes: int, block_size: int, max_length: int, dtype: torch.dtype
) -> dict[int, int]:
    """How many blocks each span gets out of `nbytes`: in proportion to what a sequence of `max_length` tokens holds.

    Raises:
        UserError: there is not even a block for each span, or as `slots_of_spans`.
    """
    sequence = sequence_bytes(config, block_size, max_length, dtype)
    held = blocks_of_sequence(config, block_size, max_length)
    blocks = {span: count * nbytes // sequence for span, count in held.items()}
    if not all(blocks.values()):
        raise UserError(f"a cache of {nbytes:,} bytes is too small: a block of {block_size} tokens does not fit")
    return blocks


class PagedStep(CacheStep):
    """One forward pass over the new tokens of some rows.

    Keys and values of all rows are stored before any row attends, so a row may read blocks that another one fills in
    the same pass. What depends only on lengths and tables is worked out once and shared by all layers.
    """

    def __init__(self, cache: PagedCache, rows: Sequence[PagedRow]) -> None:
        self.cache, self.rows = cache, rows
        new = torch.tensor([row.new for row in rows])
        starts = torch.tensor([row.start for row in rows])
        row_of = torch.repeat_interleave(torch.arange(len(rows)), new)
        ends = new.cumsum(0)
        positions = torch.arange(int(ends[-1])) - (ends - new - starts)[row_of]
        self._new, self._ends, self._row_of, self._positions = new, ends, row_of, positions
        self.positions = positions[None].to(cache.device)
        asked = torch.tensor([row.wanted for row in rows])
        # Where every token is wanted there is nothing to leave out.
        self.wanted = None if asked.all() and len(positions) == len(rows) else (ends - 1)[asked].to(cache.device)
        self._asked_rows = asked.nonzero()[:, 0]
        self._tables = {span: _pad([row.tables[span] for row in rows]) for span in set(cache.spans)}
        self._places = {span: self._places_in(span) for span in self._tables}
        self._rows: dict[tuple[int, int | None, bool], tuple[PagedRows, ...]] = {}

    def store_keys(self, owner: int, fresh: Tensor) -> Tensor:
        return self._store(self.cache.keys[owner], self.cache.scales.keys[owner], owner, fresh)

    def store_values(self, owner: int, fresh: Tensor) -> Tensor:
        return self._store(self.cache.values[owner], self.cache.scales.values[owner], owner, fresh)

    def mask(self, layer: int) -> PagedMask:
        cache, plan = self.cache, self.cache.plan
        narrow = self.wanted is not None and layer >= plan.prefill_cut
        key = (cache.spans[layer], plan.windows[layer], narrow)
        if key not in self._rows:
            self._rows[key] = self._make_rows(*key)
        scales = cache.scales
        return PagedMask(
            self._rows[key],
            key_scale=scales.keys[plan.key_sources[layer]],
            value_scale=scales.values[plan.value_sources[layer]],
        )

    def _store(self, pool: Tensor, scale: float, owner: int, fresh: Tensor) -> Tensor:
        tokens = fresh.detach()[0].transpose(0, 1)
        if scale != 1:
            tokens = tokens / scale
        if pool.dtype != tokens.dtype:  # the conversion alone may make NaN of what is too large
            limits = torch.finfo(pool.dtype)
            tokens = tokens.clamp(limits.min, limits.max)
        pool.flatten(0, 1)[self._places[self.cache.spans[owner]]] = tokens.to(pool.dtype)
        return pool

    def _places_in(self, span: int) -> Tensor:
        """Where in the span's pools each new token goes, counted in tokens."""
        table, first = self._tables[span]
        size = self.cache.block_size
        blocks = table[self._row_of, self._positions // size - first[self._row_of]]
        return (blocks * size + self._positions % size).to(self.cache.device)

    def _make_rows(self, span: int, window: int | None, narrow: bool) -> tuple[PagedRows, ...]:
        """How all new tokens look at a span or, narrow, the wanted ones, which are then a batch of their own."""
        groups: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, number of each query, and the token it belongs to
        if narrow and len(self._asked_rows):
            tokens = (self._ends - 1)[self._asked_rows, None]
            groups = [(self._asked_rows, torch.arange(len(tokens))[:, None], tokens)]
        elif not narrow:
            for count in sorted({row.new for row in self.rows}):
                rows = (self._new == count).nonzero()[:, 0]
                tokens = (self._ends - count)[rows, None] + torch.arange(count)
                groups.append((rows, tokens, tokens))
        table, first = self._tables[span]
        size, device = self.cache.block_size, self.cache.device
        parts = []
        for rows, queries, tokens in groups:
            positions = self._positions[tokens]
            blocks = int((positions[:, -1] // size - first[rows]).max()) + 1
            keys = first[rows, None] * size + torch.arange(blocks * size)
            # What a row's table does not have lies after the row's last token, where nothing looks.
            mask = positional_mask(positions, keys, window)
            parts.append(PagedRows(queries.flatten().to(device), table[rows, :blocks].to(device), mask.to(device)))
        return tuple(parts)


def _pad(tables: Sequence[BlockTable]) -> tuple[Tensor, Tensor]:
    """Block numbers [R, M], filled up with 0, and the first block of each row [R]."""
    width = max(len(table.blocks) for table in tables)
    padded = [table.blocks + [0] * (width - len(table.blocks)) for table in tables]
    return torch.tensor(padded), torch.tensor([table.first for table in tables])
