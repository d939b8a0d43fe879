"""The Triton kernel of `swiglu`: one program for some columns of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosslayer.kernels.dependent_launch_triton import dependent_launch, follow
from crosslayer.kernels.rms_triton import inverse_rms

# Up to so many rows, more programs of fewer columns each are done sooner, though each reads the residual anew. With
# more, one for a whole row is, unless its registers would not hold that.
NARROW_UP_TO, WIDEST = 512, 8192


@triton.jit
def swiglu_kernel(
    gate_up,
    residual,
    output,
    gate_up_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    # All loads before the reduction, so that their waits overlap.
    gate = tl.load(gate_up + row * gate_up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_rms(residual + row * residual_stride, eps, HIDDEN)
    gate *= inverse
    result = gate * tl.sigmoid(gate) * (up * inverse)
    tl.store(output + row * WIDTH + columns, result.to(output.dtype.element_ty), mask=inside)


def launch_swiglu(gate_up: Tensor, residual: Tensor, eps: float) -> Tensor:
    rows, width = len(gate_up), gate_up.shape[1] // 2
    output = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block, num_warps = (1024, 4) if rows <= NARROW_UP_TO else (min(triton.next_power_of_2(width), WIDEST), 8)
    if rows:
        swiglu_kernel[(rows, triton.cdiv(width, block))](
            gate_up,
            residual,
            output,
            gate_up.stride(0),
            residual.stride(0),
            eps,
            HIDDEN=residual.shape[1],
            WIDTH=width,
            BLOCK=block,
            num_warps=num_warps,
            **dependent_launch(gate_up),
        )
    return output
