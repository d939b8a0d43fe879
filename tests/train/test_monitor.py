"""What is counted about steps, against figures worked out directly from all of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from crosslayer.train.monitor import SPIKE_HISTORY, SPIKE_WINDOW, Monitor
from crosslayer.train.step import StepOutput


def follow(monitor: Monitor, losses: np.ndarray, norm: float = 1.0) -> Monitor:
    for loss in losses:
        monitor.add(StepOutput(torch.tensor(float(loss)), torch.tensor(norm)))
    monitor.settle()
    return monitor


def noise(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 0.1, number).astype(np.float32)


def test_mean_and_variance_weigh_equally_at_first_and_then_less_the_older() -> None:
    losses = noise(1400)
    early = follow(Monitor(), losses[:700])
    assert early.mean_loss == pytest.approx(losses[:700].mean(dtype=float), rel=1e-9)
    assert early.variance == pytest.approx(losses[:700].var(dtype=float), rel=1e-9)

    weights = np.full(SPIKE_WINDOW, 1 / SPIKE_WINDOW)
    for _ in range(1400 - SPIKE_WINDOW):
        weights = np.append(weights * (1 - 1 / SPIKE_WINDOW), 1 / SPIKE_WINDOW)
    mean = (weights * losses).sum()
    late = follow(early, losses[700:])
    assert late.mean_loss == pytest.approx(mean, rel=1e-9)
    assert late.variance == pytest.approx((weights * (losses - mean) ** 2).sum(), rel=1e-9)


def test_spikes_are_losses_far_above_the_others() -> None:
    losses = noise(3000)
    assert follow(Monitor(), losses).spikes == 0
    losses[[200, 900, 2500]] += 1.0  # ten deviations
    losses[1500] -= 1.0
    losses[1700] += 0.5
    assert follow(Monitor(), losses).spikes == 3


def test_learning_is_no_spike_and_nor_is_a_beginning() -> None:
    assert follow(Monitor(), 3 + 8 * np.exp(-np.arange(2000) / 150) + noise(2000) - 3).spikes == 0
    beginning = noise(SPIKE_HISTORY + 2)
    beginning[SPIKE_HISTORY - 1] = 9.0
    assert follow(Monitor(), beginning).spikes == 0
    beginning = noise(SPIKE_HISTORY + 2)
    beginning[SPIKE_HISTORY] = 9.0
    assert follow(Monitor(), beginning).spikes == 1


def test_skipped_steps_count_in_nothing_else() -> None:
    monitor = Monitor()
    for loss, norm in ((2.0, 1.0), (math.nan, math.nan), (5.0, math.inf), (4.0, 3.0), (math.inf, math.nan)):
        monitor.add(StepOutput(torch.tensor(loss), torch.tensor(norm)))
    assert monitor.skipped_steps == 0  # nothing has been waited for yet
    monitor.settle()
    assert (monitor.skipped_steps, monitor.skipped_in_a_row) == (3, 1)
    assert monitor.mean_since_last() == {"loss": 3.0, "grad_norm": 2.0}
    assert monitor.mean_since_last() == {}
    assert math.isfinite(monitor.mean_loss)


@pytest.mark.parametrize("cut", [1, 70, 1234])
def test_it_goes_on_from_what_a_checkpoint_keeps(cut: int) -> None:
    losses = noise(1600)
    losses[[100, 1300]] += 1.0
    whole = follow(Monitor(), losses)
    first = follow(Monitor(), losses[: cut - 1])
    first.add(StepOutput(torch.tensor(losses[cut - 1]), torch.tensor(1.0)))  # not settled
    kept = json.loads(json.dumps(first.to_dict()))
    assert follow(Monitor(**kept), losses[cut:]).to_dict() == whole.to_dict()
    assert whole.spikes == 2
