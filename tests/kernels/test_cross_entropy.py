"""The loss of logits and its gradient against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as reference_loss

from crosslayer.kernels.cross_entropy import cross_entropy

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Vocabularies below, at and above a block of the kernel's, and the paper's.
VOCABULARIES = (7, 4096, 4097, 50304)


def expected(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.clone().double().requires_grad_()
    losses = reference_loss(exact, targets.where(targets >= 0, -100), reduction="none")
    losses.sum().backward()
    assert exact.grad is not None
    return losses.detach(), exact.grad


def check(device: str, dtype: torch.dtype, vocab_size: int, scale: float, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(33, vocab_size, generator=generator)).to(device, dtype)
    targets = torch.randint(-2, vocab_size, (33,), generator=generator).to(device)
    targets[0], targets[1] = -1, vocab_size - 1
    losses, gradient = expected(logits, targets)
    untouched = logits.clone()
    only_losses = cross_entropy(untouched, targets, want_grad=False)
    assert torch.equal(untouched, logits)
    got = cross_entropy(logits, targets, want_grad=True)
    assert torch.equal(got, only_losses)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert (got.double() - losses).norm() <= tolerance * losses.norm()
    # The gradient is stored in the logits' own precision.
    assert (logits.double() - gradient).norm() <= (tolerance + 2 * torch.finfo(dtype).eps) * gradient.norm()
    assert not logits[0].any()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_in_pytorch(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    check("cpu", dtype, 61, scale, tolerance)


@needs_cuda
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_kernel(vocab_size: int, dtype: torch.dtype, scale: float) -> None:
    # Of logits of several hundreds float32 knows no more than five digits after the point, and so of probabilities.
    check("cuda", dtype, vocab_size, scale, 1e-6 * scale)


@needs_cuda
def test_kernel_without_rows() -> None:
    assert cross_entropy(
        torch.empty(0, 5, device="cuda"), torch.empty(0, dtype=torch.int64, device="cuda"), True
    ).shape == (0,)
