"""A preallocated key/value cache addressed by slot.

There is one buffer per slot of the sharing plan, owned by the layer that writes it; readers have none. A slot that
only windowed layers read is a ring of its window's length, so the bytes allocated are the bytes the plan says.
Rows advance by different amounts, so prompts of different length share a batch without padding tricks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model.attention import Mask, positional_mask
from crosslayer.plan import ModelConfig


class ContiguousCache:
    """Room for `batch_size` rows of up to `max_length` tokens each.

    `keys[owner]` and `values[owner]` are [B, G, C, D], with C = min(max_length, largest window of the slot's readers);
    the token at position p is stored at p mod C. `lengths` [B] (int64, on the CPU) counts the tokens in each row.
    What is stored carries no gradient: a cache is for inference.

    Raises:
        UserError: a layer reads keys and values that are kept for different numbers of tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        plan = config.plan
        for layer in range(plan.num_layers):
            key_slot, value_slot = (
                plan.key_slots[plan.key_sources[layer]],
                plan.value_slots[plan.value_sources[layer]],
            )
            if key_slot.capacity(max_length) != value_slot.capacity(max_length):
                raise UserError(
                    f"layer {layer}: its keys (layer {key_slot.owner}) are cached for {key_slot.capacity(max_length)} "
                    f"tokens but its values (layer {value_slot.owner}) for {value_slot.capacity(max_length)}; "
                    "give the readers of both the same windows"
                )

        def allocate(capacity: int) -> Tensor:
            # Zeros, not empty: a masked entry still meets its zero weight, and 0 times a stray NaN is NaN.
            shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = {owner: allocate(slot.capacity(max_length)) for owner, slot in plan.key_slots.items()}
        self.values = {owner: allocate(slot.capacity(max_length)) for owner, slot in plan.value_slots.items()}
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in (*self.keys.values(), *self.values.values()))

    def begin(self, input_ids: Tensor, new_lengths: Tensor | None) -> CacheStep:
        """Prepare to append tokens [B, T], of which row b uses its first new_lengths[b] (default all).

        Raises:
            UserError: `input_ids` has another number of rows than the cache, `new_lengths` does not fit it, or a row
                would outgrow `max_length`.
        """
        (rows, num_tokens), batch_size = input_ids.shape, len(self.lengths)
        if rows != batch_size:
            raise UserError(f"the cache has {batch_size} rows, but input_ids has {rows}")
        new = torch.full_like(self.lengths, num_tokens) if new_lengths is None else new_lengths.cpu().long()
        if new.shape != self.lengths.shape or new.min() < 0 or new.max() > num_tokens:
            raise UserError(f"new_lengths must be {rows} numbers from 0 to {num_tokens}, got {new.tolist()}")
        longest = int((self.lengths + new).max())
        if longest > self.max_length:
            raise UserError(f"the cache holds {self.max_length} tokens a row, but a row would need {longest}")
        return CacheStep(self, num_tokens, self.lengths, new, input_ids.device)

    def advance(self, step: CacheStep) -> None:
        """Count the tokens of a finished step."""
        self.lengths = step.old + step.new


@dataclass
class CacheStep:
    """One forward pass over a cache: rows hold `old` tokens and gain `new`, out of `num_tokens` columns.

    Everything that depends only on lengths (positions, masks, where tokens are written) is worked out once and shared
    by all layers.
    """

    cache: ContiguousCache
    num_tokens: int
    old: Tensor
    new: Tensor
    device: torch.device
    _masks: dict[tuple[int | None, int], Mask] = field(default_factory=dict)
    _writes: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = not self.old.any()
        self.span = int((self.old + self.new).max())
        self._positions = self.old[:, None] + torch.arange(self.num_tokens)
        self.positions = self._positions.to(self.device)  # [B, T]

    def append(self, buffer: Tensor, fresh: Tensor) -> Tensor:
        """Store new keys or values [B, G, T, D] in a slot; return all that its readers may look at [B, G, S, D]."""
        capacity = buffer.shape[2]
        if self.first:
            seen = fresh
        elif self._is_ring(capacity):
            # The ring forgets its oldest tokens while the first of the new ones still look at them.
            seen = torch.cat((buffer, fresh.to(buffer.dtype)), dim=2)
        rows, columns, places = self._write_indices(capacity)
        buffer[rows, :, places] = fresh.detach()[rows, :, columns].to(buffer.dtype)
        if not self.first and not self._is_ring(capacity):
            seen = buffer[:, :, : self.span]
        return seen

    def mask(self, window: int | None, capacity: int) -> Mask:
        """The mask for a layer with this window that reads a slot of this capacity."""
        key = (window, capacity)
        if key not in self._masks:
            self._masks[key] = self._make_mask(window, capacity)
        return self._masks[key]

    def _make_mask(self, window: int | None, capacity: int) -> Mask:
        # Never a FlexAttention mask: its kernel is compiled anew, for seconds, at every new length of prompt.
        if self.first:
            if window is None or window >= self.num_tokens:
                return None
            keys = torch.arange(self.num_tokens)[None]
        elif self._is_ring(capacity):
            newest = self.old[:, None] - 1
            stored = newest - (newest - torch.arange(capacity)) % capacity  # negative where nothing is stored yet
            keys = torch.cat((stored, self._positions), dim=1)
        else:
            keys = torch.arange(self.span)[None]
        return positional_mask(self.positions, keys.to(self.device), window)

    def _is_ring(self, capacity: int) -> bool:
        return capacity < self.cache.max_length

    def _write_indices(self, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and place in the buffer of every token to store: the newest `capacity` of each row."""
        if capacity not in self._writes:
            columns = torch.arange(self.num_tokens)
            kept = (columns < self.new[:, None]) & (columns >= self.new[:, None] - capacity)
            rows, kept_columns = kept.nonzero(as_tuple=True)
            places = self._positions[rows, kept_columns] % capacity
            on_device = (rows.to(self.device), kept_columns.to(self.device), places.to(self.device))
            self._writes[capacity] = on_device
        return self._writes[capacity]
