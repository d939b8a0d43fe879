"""A key/value cache in blocks: one pool per slot, and tables that say which blocks a sequence holds.

Slots that are kept for equally many tokens (all those without a window, or those with the same one) share their block
numbers: block b of such a *span* is block b in the pool of each of its slots. So a sequence needs one table per span,
no matter how many layers there are, and a layer finds its keys and its values by the same table, whoever owns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model.cache import slot_capacities
from crosslayer.plan import ModelConfig


@dataclass
class BlockTable:
    """The blocks of one sequence in one span: those of its tokens from block number `first` on, oldest first."""

    first: int = 0
    blocks: list[int] = field(default_factory=list)


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
        self.block_size, self.max_length = block_size, max_length
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

    def blocks_of_row(self, span: int, most_new: int) -> int:
        """The most blocks of a span that a sequence holds while it gains up to so many tokens at a time."""
        return _blocks_held(min(span + most_new - 1, self.max_length), self.block_size, self.max_length)


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
    return {span: _blocks_held(span, block_size, max_length) for span in slots_of_spans(config, max_length)}


def _blocks_held(span: int, block_size: int, max_length: int) -> int:
    # A window that starts inside a block reaches into one block more.
    return -(-span // block_size) + (span < max_length)


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
