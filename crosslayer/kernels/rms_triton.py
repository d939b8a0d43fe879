"""What RMS normalisation divides by, inside other Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def inverse_rms(row, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of the WIDTH numbers at `row`, in float32."""
    BLOCK: tl.constexpr = min(triton.next_power_of_2(WIDTH), 4096)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        x = tl.load(row + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
