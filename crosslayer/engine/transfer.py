"""Many small arrays to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


def pack(arrays: Mapping[str, np.ndarray], *, pinned: bool) -> Tensor:
    """All arrays in one tensor of bytes on the host, page-locked where a GPU is to read it while the host goes on."""
    packed = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=pinned)
    pack_into(packed, arrays)
    return packed


def packed_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(_room(array.nbytes) for array in arrays.values())


def pack_into(packed: Tensor, arrays: Mapping[str, np.ndarray]) -> None:
    """What `pack` does, in a tensor of at least `packed_bytes`."""
    view, offset = packed.numpy(), 0
    for array in arrays.values():
        view[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        offset += _room(array.nbytes)


def unpack(packed: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Views of what `pack` made of arrays of these shapes and dtypes."""
    views, offset = {}, 0
    for name, array in arrays.items():
        dtype = torch.int32 if array.dtype == np.int32 else torch.int64
        views[name] = packed[offset : offset + array.nbytes].view(dtype).view(array.shape)
        offset += _room(array.nbytes)
    return views


def _room(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
