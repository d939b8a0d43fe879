"""The fused loss against torch's own cross-entropy of the logits, in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode

from crosslayer.model import loss as loss_module
from crosslayer.model.loss import linear_cross_entropy

N, C, V = 37, 8, 11


def random_input(
    n: int = N, c: int = C, v: int = V, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, c, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, c, generator=generator, dtype=torch.float64).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), generator=generator)


def expected_of(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients, in float64, through autograd."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = cross_entropy(linear(hidden, weight), targets, reduction="sum")
    (loss * scale).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 3 * V, 10 * V, N * V, 2**19])
def test_value_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_CHUNK", chunk)
    hidden, weight, targets = random_input()
    expected = expected_of(hidden, weight, targets, scale=0.37)
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 0.37).backward()
    torch.testing.assert_close((loss.detach(), hidden.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)


def test_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_CHUNK", 2 * 5)
    hidden, weight, targets = random_input(n=5, c=3, v=5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_float32_and_extreme_logits() -> None:
    hidden, weight, targets = random_input(dtype=torch.float32)
    with torch.no_grad():
        hidden.mul_(1e3)
    expected = expected_of(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    torch.testing.assert_close(
        (loss.detach().double(), hidden.grad.double(), weight.grad.double()), expected, rtol=1e-5, atol=1e-3
    )


def test_bfloat16_autocast() -> None:
    """Products are rounded to bfloat16: a logit is off by at most 2^-8 of its size, a gradient by about that."""
    hidden, weight, targets = random_input(n=256, c=32, v=300, dtype=torch.float32)
    expected_loss, *expected_gradients = expected_of(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected_loss.item()) < 2**-8 * expected_loss.item()
    assert loss.item() != pytest.approx(expected_loss.item(), rel=1e-6)  # it did run in bfloat16
    for actual, expected in zip((hidden.grad, weight.grad), expected_gradients, strict=True):
        assert actual is not None
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() < 2**-6 * expected.norm()


def matmuls(hidden: Tensor, weight: Tensor, targets: Tensor, context: AbstractContextManager[object]) -> float:
    """Work of the forward pass, counted in products of all hidden states with the whole weight."""
    with FlopCounterMode(display=False) as counter, context:
        linear_cross_entropy(hidden, weight, targets)
    return counter.get_total_flops() / (2 * N * C * V)


def test_gradients_are_worked_out_only_where_wanted() -> None:
    hidden, weight, targets = random_input()
    expected_loss, hidden_grad, weight_grad = expected_of(hidden, weight, targets)
    assert matmuls(hidden, weight, targets, nullcontext()) == 3
    for context in (torch.no_grad(), torch.inference_mode()):
        assert matmuls(hidden, weight, targets, context) == 1
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss)

    frozen = weight.detach()
    assert matmuls(hidden, frozen, targets, nullcontext()) == 2
    linear_cross_entropy(hidden, frozen, targets).backward()
    torch.testing.assert_close(hidden.grad, hidden_grad)

    frozen = hidden.detach()
    assert matmuls(frozen, weight, targets, nullcontext()) == 2
    linear_cross_entropy(frozen, weight, targets).backward()
    torch.testing.assert_close(weight.grad, weight_grad)


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(V, (2, N), generator=generator)
    gradients = []
    for fused in (True, False):
        embedding = nn.Embedding(V, C, dtype=torch.float64, _weight=random_input()[1].detach())
        hidden = embedding(ids).tanh()
        if fused:
            loss = linear_cross_entropy(hidden, embedding.weight, targets)
        else:
            loss = cross_entropy(linear(hidden, embedding.weight), targets, reduction="sum")
        loss.backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_negative_targets_count_for_nothing() -> None:
    hidden, weight, targets = random_input()
    counted = targets >= 4
    expected = expected_of(hidden, weight, targets.where(counted, -100))
    loss = linear_cross_entropy(hidden, weight, targets.where(counted, -1))
    loss.backward()
    torch.testing.assert_close((loss.detach(), hidden.grad, weight.grad), expected, rtol=1e-12, atol=1e-12)


def test_no_tokens() -> None:
    hidden, weight, targets = random_input(n=0)
    assert linear_cross_entropy(hidden, weight, targets).item() == 0
