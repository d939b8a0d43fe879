"""How the Triton kernels of `project` for few rows are cut and launched.

The functions are those of the same names in `project`, for x [N, K] of at most `MOST_ROWS` rows. All is float32 inside,
with one rounding at the end; logits stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from crosslayer.kernels.dependent_launch_triton import dependent_launch
from crosslayer.kernels.few_rows_triton import add_kernel, logits_kernel, rope_store_kernel, swiglu_kernel
from crosslayer.kernels.rope_store_triton import limit_of

# The kernels are unrolled over the rows. With four, cuBLAS is faster already: how many `project` sends here, it says.
MOST_ROWS = 4
# Of a thread's 255 registers of four bytes, what may be filled with weights.
BYTES_PER_THREAD = 384


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut into programs."""

    rows: int
    """Rows of the weight that a program owns: a power of two, from 2."""
    num_warps: int
    """At least so many; more where a row is so long that their registers would not hold the program's rows."""

    def options(self, x: Tensor) -> dict[str, int | bool]:
        """What kernels and Triton want to know for inputs x [N, K]."""
        count, columns = x.shape
        assert count <= MOST_ROWS
        num_warps = self.num_warps
        while num_warps < 32 and self.rows * columns * x.element_size() > num_warps * 32 * BYTES_PER_THREAD:
            num_warps *= 2
        # Columns at a time: of each tile, every thread holds 16 bytes, which is its widest load.
        block = num_warps * 32 * 16 // x.element_size() // self.rows
        block = min(block, max(16, next_power_of_2(columns)))
        options = {"N": count, "K": columns, "ROWS": self.rows, "BLOCK": block, "num_warps": num_warps}
        return options | dependent_launch(x)


# The best of those that benchmarks/few_rows.py tries, on an H100.
ROPE_STORE = Launch(rows=2, num_warps=4)
SWIGLU = Launch(rows=2, num_warps=2)
ADD = Launch(rows=4, num_warps=8)
LONG_ADD = Launch(rows=8, num_warps=4)  # where x is wider than 4096
LOGITS = Launch(rows=2, num_warps=4)


def project_rope_store(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, *,
    head_dim: int, num_heads: int, num_kv_heads: int, bias: Tensor | None,
    keys: Tensor | None, values: Tensor | None, places: Tensor, key_scale: float, value_scale: float,
    launch: Launch = ROPE_STORE,
) -> Tensor:  # fmt: skip
    q = x.new_empty(len(x), num_heads, head_dim)
    rope_store_kernel[(cdiv(len(weight), launch.rows),)](
        x, weight, bias, cos, sin, q, keys, values, places, len(weight) // 2, eps, key_scale, value_scale,
        HEADS=num_heads, GROUPS=num_kv_heads, DIM=head_dim, KEY_LIMIT=limit_of(keys), VALUE_LIMIT=limit_of(values),
        **launch.options(x),
    )  # fmt: skip
    return q


def project_swiglu(x: Tensor, weight: Tensor, eps: float, *, launch: Launch = SWIGLU) -> Tensor:
    size = len(weight) // 2
    output = x.new_empty(len(x), size)
    swiglu_kernel[(cdiv(2 * size, launch.rows),)](x, weight, output, size, eps, **launch.options(x))
    return output


def project_add(x: Tensor, weight: Tensor, residual: Tensor, *, launch: Launch | None = None) -> None:
    size = len(weight)
    launch = launch or (ADD if x.shape[1] <= 4096 else LONG_ADD)
    add_kernel[(cdiv(size, launch.rows),)](x, weight, residual, size, **launch.options(x))


def project_logits(x: Tensor, weight: Tensor, gain: Tensor, eps: float, *, launch: Launch = LOGITS) -> Tensor:
    size = len(weight)
    output = torch.empty(len(x), size, dtype=torch.float32, device=x.device)
    logits_kernel[(cdiv(size, launch.rows),)](x, weight, gain, output, size, eps, **launch.options(x))
    return output
