"""How the Triton kernels of `project` for some rows are cut and launched.

The functions are those of the same names in `project`, for x [N, K] of at most 64 rows in bfloat16 or float16.
Sums are float32, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from crosslayer.kernels.counters import counters
from crosslayer.kernels.dependent_launch_triton import dependent_launch
from crosslayer.kernels.rope_store_triton import limit_of
from crosslayer.kernels.some_rows_triton import add_kernel, rope_store_kernel, swiglu_kernel


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut into programs."""

    rows: int
    """Rows of the weight that a program owns: a power of two, from 64."""
    block: int
    """Columns at a time."""
    num_warps: int
    num_stages: int
    programs: int
    """The columns are split so that there are about so many programs."""
    held: int
    """The first columns of a part, a power of two of them or none, that are read before the kernel before has ended."""

    def splits(self, tiles: int, columns: int) -> int:
        """Into how many parts the columns are split: each has at least those held, and a block."""
        most: int = cdiv(columns, self.block) // max(1, self.held // self.block)
        return max(1, min(round(self.programs / tiles), most))


@dataclass(frozen=True)
class Cuts:
    """How each kernel is cut for up to so many tokens."""

    most_tokens: int
    rope_store: Cut
    swiglu: Cut
    add: Cut
    long_add: Cut  # where x is wider than 4096


# The best found on an H100, in the engine's decode step. Where nothing is held, two programs share a processor.
ADD = Cut(64, 128, 8, 3, 128, 512)
CUTS = (
    Cuts(16, Cut(64, 128, 4, 3, 144, 256), Cut(64, 128, 4, 3, 171, 256), ADD, Cut(64, 128, 4, 5, 128, 256)),
    Cuts(32, Cut(64, 128, 4, 4, 108, 256), Cut(64, 128, 4, 4, 171, 0), ADD, Cut(64, 128, 4, 4, 128, 256)),
    Cuts(64, Cut(64, 128, 4, 4, 108, 256), Cut(64, 64, 4, 5, 171, 128), ADD, Cut(64, 128, 4, 4, 128, 256)),
)


@cache
def are_fast_on(device: torch.device) -> bool:
    """Where they were measured: elsewhere they may be slow, or want more shared memory than there is."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def cuts_for(tokens: int) -> Cuts:
    return next(cuts for cuts in CUTS if tokens <= cuts.most_tokens)


def project_rope_store(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *,
    head_dim: int, num_heads: int, num_kv_heads: int, bias: Tensor | None,
    keys: Tensor | None, values: Tensor | None, places: Tensor, key_scale: float, value_scale: float,
) -> Tensor:  # fmt: skip
    q = x.new_empty(len(x), num_heads, head_dim)
    grid, room, options = _launch(x, weight, cuts_for(len(x)).rope_store)
    rope_store_kernel[grid](
        x, weight, bias, cos, sin, q, keys, values, places, *room, len(weight) // 2, len(x), eps, key_scale,
        value_scale, HEADS=num_heads, GROUPS=num_kv_heads, DIM=head_dim, KEY_LIMIT=limit_of(keys),
        VALUE_LIMIT=limit_of(values), **options,
    )  # fmt: skip
    return q


def project_swiglu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = len(weight) // 2
    output = x.new_empty(len(x), size)
    grid, room, options = _launch(x, weight, cuts_for(len(x)).swiglu)
    swiglu_kernel[grid](x, weight, output, *room, size, len(x), eps, **options)
    return output


def project_add(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    cuts = cuts_for(len(x))
    grid, room, options = _launch(x, weight, cuts.add if x.shape[1] <= 4096 else cuts.long_add)
    add_kernel[grid](x, weight, residual, *room, len(weight), len(x), **options)


def _launch(x: Tensor, weight: Tensor, cut: Cut) -> tuple[tuple[int, int], tuple[Tensor, Tensor], dict[str, Any]]:
    """The grid, room for parts and counters of them, and what kernels and Triton want to know besides."""
    count, columns = x.shape
    tiles, tokens = cdiv(len(weight), cut.rows), max(16, next_power_of_2(count))
    splits = cut.splits(tiles, columns)
    size = tiles * splits * (cut.rows + 1) * tokens if splits > 1 else 0
    room = (torch.empty(size, dtype=torch.float32, device=x.device), counters(x.device, tiles))
    held = cut.held if cut.held <= columns else 0
    options = {"K": columns, "TOKENS": tokens, "ROWS": cut.rows, "BLOCK": cut.block, "SPLITS": splits, "HELD": held}
    options |= {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    return (tiles, splits), room, options | dependent_launch(x)
