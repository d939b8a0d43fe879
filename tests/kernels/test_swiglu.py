"""SwiGLU with the norm after the product, against the norm before it, in float64."""

from __future__ import annotations

import pytest
import torch

from crosslayer.kernels.swiglu import swiglu

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
EPS = 1e-3
# Rows, hidden size, and width: below and above what one program takes.
SHAPES = ((1, 8, 5), (3, 5000, 12), (2, 24, 1500))


def check(rows: int, hidden: int, width: int, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = (0.1 * torch.randn(rows, hidden, generator=generator)).to(dtype)
    weight = torch.randn(2 * width, hidden, generator=generator).double()
    gate_up = (residual.double() @ weight.T).to(dtype)
    got = swiglu(gate_up.to(device), residual.to(device), EPS)
    exact = residual.double()
    normalised = exact / (exact.square().mean(1, keepdim=True) + EPS).sqrt()
    gate, up = (normalised @ weight.T).split(width, dim=1)
    want = gate / (1 + (-gate).exp()) * up
    assert got.dtype == dtype
    # The product and the result are rounded to `dtype`.
    assert (got.cpu().double() - want).norm() <= (1e-6 + torch.finfo(dtype).eps) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_pytorch(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, "cpu", dtype)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 2048, 5504), (600, 64, 9000)])
def test_on_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, "cuda", dtype)
