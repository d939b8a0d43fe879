"""The learning-rate schedule, and AdamW with clipping against a version of it written out in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crosslayer.model import Transformer
from crosslayer.train import optimizer as optimizer_module
from crosslayer.train.optimizer import clipped_step, learning_rate_at, make_optimizer
from tests.conftest import tiny_config
from tests.model.checks import loss_and_gradients, random_model, random_tokens


def rates(steps: int, warmup_ratio: float = 0.05, final_ratio: float = 0.1) -> list[float]:
    return [
        learning_rate_at(step, steps, peak=2.0, warmup_ratio=warmup_ratio, final_ratio=final_ratio)
        for step in range(steps)
    ]


def test_schedule() -> None:
    """1000 steps: 50 of warm-up to the peak, then 950 down a cosine to a tenth of it."""
    schedule = rates(1000)
    assert schedule[:50] == pytest.approx([2.0 * (step + 1) / 50 for step in range(50)])
    assert schedule[50 + 475 - 1] == pytest.approx((2.0 + 0.2) / 2)  # half-way
    assert schedule[50 + 237] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 238 / 950)) / 2)
    assert schedule[-1] == pytest.approx(0.2)


def test_short_schedules() -> None:
    assert rates(1) == [2.0]
    assert rates(2) == pytest.approx([2.0, 0.2])
    assert rates(3) == pytest.approx([2.0, 1.1, 0.2])
    assert rates(2, warmup_ratio=0.0) == pytest.approx([1.1, 0.2])
    assert rates(4, warmup_ratio=1.0) == [0.5, 1.0, 1.5, 2.0]
    assert rates(3, warmup_ratio=0.1, final_ratio=1.0) == [2.0, 2.0, 2.0]


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_rises_once_and_falls_once(steps: int, warmup_ratio: float, final_ratio: float) -> None:
    schedule = rates(steps, warmup_ratio, final_ratio)
    top = schedule.index(max(schedule))
    assert all(a <= b for a, b in pairwise(schedule[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(schedule[top:]))
    assert 0 <= min(schedule) <= max(schedule) <= 2.0


def test_matrices_decay_and_nothing_else() -> None:
    model = Transformer(tiny_config(attention_bias=True, qk_norm=True, tie_word_embeddings=True))
    optimizer = make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        matrix = name.endswith("_proj.weight") or name == "model.embed_tokens.weight"
        assert decay == (0.1 if matrix else 0.0), name


def adamw(weights: dict[str, Tensor], gradients: list[dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    """AdamW (arXiv 1711.05101, algorithm 2) with clipping by the total norm, one step for each dict of gradients."""
    rate, beta1, beta2, epsilon, decay = 1e-2, 0.9, 0.95, 1e-8, 0.1
    weights = {name: weight.clone() for name, weight in weights.items()}
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step, raw in enumerate(gradients, start=1):
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in raw.values()))
        for name, weight in weights.items():
            gradient = raw[name] * min(1.0, clip / norm)
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient**2
            move = mean[name] / (1 - beta1**step) / ((square[name] / (1 - beta2**step)).sqrt() + epsilon)
            weights[name] = weight - rate * (decay * weight * (weight.ndim > 1) + move)
    return weights


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_three_steps_against_adamw_written_out(clip: float) -> None:
    model = random_model(tiny_config("cla2", tie_word_embeddings=True)).double()
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients, norms = [], []
    for step in range(3):
        _, raw = loss_and_gradients(model, random_tokens(model, 2, 9, seed=step))
        gradients.append(raw)
        norms.append(float(clipped_step(optimizer, clip)))
    assert norms == pytest.approx([math.sqrt(sum(float(g.square().sum()) for g in raw.values())) for raw in gradients])
    assert min(norms) > 0.5  # one case clips, ...
    assert max(norms) < 1e3  # ... the other does not
    expected = adamw(start, gradients, clip)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-9, msg=name)
        moved = (parameter.detach() - start[name]).abs().max()
        assert moved > 1e-3, name


def test_a_step_without_a_finite_gradient_changes_nothing() -> None:
    model = random_model(tiny_config())
    optimizer = make_optimizer(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss_and_gradients(model, random_tokens(model, 2, 9))
    model.lm_head.weight.grad[0, 0] = math.inf
    assert not optimizer_module.clipped_step(optimizer, 1.0).isfinite()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), start[name]), name
