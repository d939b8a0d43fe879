"""The processes of a run: one, or as many as torchrun started."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def distributed() -> bool:
    """Whether a process group has been set up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process; 0 prints, and writes what is written once."""
    return dist.get_rank() if distributed() else 0


def side_group() -> dist.ProcessGroup | None:
    """A group of all processes for messages beside the training, over gloo, so that neither the device nor training's
    own collectives wait for them; None where there is one process. All processes must call it."""
    return dist.new_group(backend="gloo") if distributed() else None


def gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The values of all processes, by rank. All processes of the group must call it."""
    if group is None:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values  # type: ignore[return-value]
