"""What the steps of a run were like: mean loss and gradient norm, steps that were skipped, spikes of the loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from crosslayer.train.step import StepOutput

# A spike, in the manner of the spike score of OLMo 2 (arXiv 2501.00656): a loss more than seven standard deviations
# above the mean of the last thousand steps. Here mean and deviation are exponential ones of that length.
SPIKE_DEVIATIONS = 7.0
SPIKE_WINDOW = 1000
# No spikes before this many steps: the deviation of a few losses says little.
SPIKE_HISTORY = 50
# A batch that breaks a step is left out and forgotten; after so many in a row the fault is not in a batch.
SKIPPED_IN_A_ROW = 10


@dataclass
class Monitor:
    """Follows the steps without making the device wait: what a step returns stays there until `settle`.

    A step whose gradients are not finite has been skipped by the optimizer, and counts in `skipped_steps` only. All
    fields are JSON, go into checkpoints, and come back from them.
    """

    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    # Of the steps since the last `mean_since_last`, those that were not skipped.
    num_steps: int = 0
    sum_loss: float = 0.0
    sum_grad_norm: float = 0.0
    # Of all losses that are finite, weighed towards the last ones.
    num_losses: int = 0
    mean_loss: float = 0.0
    variance: float = 0.0
    _unsettled: list[StepOutput] = field(default_factory=list, init=False, repr=False)

    def add(self, output: StepOutput) -> None:
        """Take note of a step, without waiting for it."""
        self._unsettled.append(output)

    @property
    def unsettled(self) -> int:
        """How many steps have been added since the last `settle`."""
        return len(self._unsettled)

    def settle(self) -> None:
        """Wait for the steps added so far and take their figures in."""
        if not self._unsettled:
            return
        figures = torch.stack([torch.stack([*output]) for output in self._unsettled]).double().cpu()
        self._unsettled.clear()
        finite = figures.isfinite()
        for (loss, norm), (loss_finite, norm_finite) in zip(figures.tolist(), finite.tolist(), strict=True):
            if norm_finite:
                self.num_steps += 1
                self.sum_loss += loss
                self.sum_grad_norm += norm
                self.skipped_in_a_row = 0
            else:
                self.skipped_steps += 1
                self.skipped_in_a_row += 1
            if loss_finite:
                self._follow(loss)

    def mean_since_last(self) -> dict[str, float]:
        """Mean `loss` and `grad_norm` of the settled steps since the last call; empty where all were skipped."""
        count, loss, norm = self.num_steps, self.sum_loss, self.sum_grad_norm
        self.num_steps, self.sum_loss, self.sum_grad_norm = 0, 0.0, 0.0
        return {"loss": loss / count, "grad_norm": norm / count} if count else {}

    def counts(self) -> dict[str, int]:
        """How many steps were skipped, and how many losses were spikes, since the beginning of the run."""
        return {"skipped_steps": self.skipped_steps, "spikes": self.spikes}

    def to_dict(self) -> dict[str, Any]:
        """The fields, all steps taken in, from which `Monitor(**fields)` goes on."""
        self.settle()
        fields = asdict(self)
        del fields["_unsettled"]
        return fields

    def _follow(self, loss: float) -> None:
        """Exponentially weighted mean and variance; equal weights until there are SPIKE_WINDOW losses."""
        excess = loss - self.mean_loss
        if self.num_losses >= SPIKE_HISTORY and excess > SPIKE_DEVIATIONS * self.variance**0.5:
            self.spikes += 1
        self.num_losses += 1
        weight = max(1 / self.num_losses, 1 / SPIKE_WINDOW)
        self.mean_loss += weight * excess
        self.variance = (1 - weight) * (self.variance + weight * excess**2)
