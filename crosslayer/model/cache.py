"""A preallocated key/value cache addressed by slot, and what a forward pass asks of any cache.

There is one buffer per slot of the sharing plan, owned by the layer that writes it; readers have none. A slot that
only windowed layers read is a ring of its window's length, so the bytes allocated are the bytes the plan says.
Rows advance by different amounts, so prompts of different length share a batch without padding tricks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model.attention import Mask, positional_mask
from crosslayer.plan import ModelConfig, SharingPlan


class CacheStep(ABC):
    """One forward pass over a cache, as the model sees it. `positions` [B, T] are those of the new tokens."""

    positions: Tensor

    @abstractmethod
    def store_keys(self, owner: int, fresh: Tensor) -> Tensor:
        """Store new keys [B, G, T, D] in the slot of `owner`; return what `attend` wants as keys."""

    @abstractmethod
    def store_values(self, owner: int, fresh: Tensor) -> Tensor:
        """Likewise values."""

    @abstractmethod
    def mask(self, layer: int) -> Mask:
        """The mask of a layer, for the keys and values that its owners' `store` returned."""

    def finish(self) -> None:
        """Called when all layers have run."""
        return


def check_one_pass(plan: SharingPlan) -> None:
    """Whether tokens can be added to a cache.

    Raises:
        UserError: they cannot, because a layer reads a layer above it.
    """
    if below := plan.readers_below_owner:
        raise UserError(
            f"layer {below[0]} reads a layer above it: such a model can be trained and evaluated, but not used with a "
            "cache, and so not to generate text"
        )


def slot_capacities(plan: SharingPlan, max_length: int) -> tuple[int, ...]:
    """Per layer, for how many tokens of a sequence of `max_length` its keys and its values are kept.

    Raises:
        UserError: a layer reads keys and values that are kept for different numbers of tokens.
    """
    capacities = []
    for layer, (key_source, value_source) in enumerate(zip(plan.key_sources, plan.value_sources, strict=True)):
        keys = plan.key_slots[key_source].capacity(max_length)
        values = plan.value_slots[value_source].capacity(max_length)
        if keys != values:
            raise UserError(
                f"layer {layer}: its keys (layer {key_source}) are cached for {keys} tokens but its values "
                f"(layer {value_source}) for {values}; give the readers of both the same windows"
            )
        capacities.append(keys)
    return tuple(capacities)


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
        self.capacities = slot_capacities(plan, max_length)

        def allocate(capacity: int) -> Tensor:
            # Zeros, not empty: a masked entry still meets its zero weight, and 0 times a stray NaN is NaN.
            shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = {owner: allocate(slot.capacity(max_length)) for owner, slot in plan.key_slots.items()}
        self.values = {owner: allocate(slot.capacity(max_length)) for owner, slot in plan.value_slots.items()}
        self.plan = plan
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in (*self.keys.values(), *self.values.values()))

    def begin(self, input_ids: Tensor, new_lengths: Tensor | None) -> ContiguousStep:
        """Prepare to append tokens [B, T], of which row b uses its first new_lengths[b] (default all).

        Raises:
            UserError: `input_ids` has another number of rows than the cache, `new_lengths` does not fit it, a row
                would outgrow `max_length`, or as `check_one_pass`.
        """
        check_one_pass(self.plan)
        (rows, num_tokens), batch_size = input_ids.shape, len(self.lengths)
        if rows != batch_size:
            raise UserError(f"the cache has {batch_size} rows, but input_ids has {rows}")
        new = torch.full_like(self.lengths, num_tokens) if new_lengths is None else new_lengths.cpu().long()
        if new.shape != self.lengths.shape or new.min() < 0 or new.max() > num_tokens:
            raise UserError(f"new_lengths must be {rows} numbers from 0 to {num_tokens}, got {new.tolist()}")
        longest = int((self.lengths + new).max())
        if longest > self.max_length:
            raise UserError(f"the cache holds {self.max_length} tokens a row, but a row would need {longest}")
        return ContiguousStep(self, num_tokens, self.lengths, new, input_ids.device)

    def advance(self, step: ContiguousStep) -> None:
        """Count the tokens of a finished step."""
        self.lengths = step.old + step.new


class ContiguousStep(CacheStep):
    """One forward pass: rows hold `old` tokens and gain `new`, out of `num_tokens` columns.

    Everything that depends only on lengths (positions, masks, where tokens are written) is worked out once and shared
    by all layers.
    """

    def __init__(self, cache: ContiguousCache, num_tokens: int, old: Tensor, new: Tensor, device: torch.device) -> None:
        self.cache, self.num_tokens, self.old, self.new, self.device = cache, num_tokens, old, new, device
        self.first = not self.old.any()
        self.span = int((self.old + self.new).max())
        self._positions = self.old[:, None] + torch.arange(self.num_tokens)
        self.positions = self._positions.to(self.device)
        self._masks: dict[tuple[int | None, int], Mask] = {}
        self._writes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def store_keys(self, owner: int, fresh: Tensor) -> Tensor:
        return self._append(self.cache.keys[owner], fresh)

    def store_values(self, owner: int, fresh: Tensor) -> Tensor:
        return self._append(self.cache.values[owner], fresh)

    def mask(self, layer: int) -> Mask:
        key = (self.cache.plan.windows[layer], self.cache.capacities[layer])
        if key not in self._masks:
            self._masks[key] = self._make_mask(*key)
        return self._masks[key]

    def finish(self) -> None:
        self.cache.advance(self)

    def _append(self, buffer: Tensor, fresh: Tensor) -> Tensor:
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
