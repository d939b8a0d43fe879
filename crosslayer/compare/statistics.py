"""What a few seeds can tell: spreads, differences paired by seed, and when to say that there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
UNRESOLVED = "not resolved at this size"


@dataclass(frozen=True)
class Spread:
    """Mean and range of a figure over seeds, and its standard deviation (None with one seed)."""

    mean: float
    low: float
    high: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(math.fsum(values) / len(values), min(values), max(values), standard_deviation(values))


@dataclass(frozen=True)
class Difference:
    """How much higher the validation loss of `design` is than that of `reference`, in nats per token, over the seeds
    that both finished.

    The same seed means the same data order and, where shapes agree, the same initial weights, so the difference is
    taken seed by seed. `low` to `high` is the 95% Student interval of its mean; None with fewer than two seeds.
    """

    design: str
    reference: str
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    low: float | None
    high: float | None
    verdict: str

    @classmethod
    def between(
        cls, design: str, losses: Mapping[int, float], reference: str, reference_losses: Mapping[int, float]
    ) -> Difference | None:
        """From losses by seed; None where the two have no seed in common."""
        seeds = tuple(seed for seed in losses if seed in reference_losses)
        if not seeds:
            return None
        differences = [losses[seed] - reference_losses[seed] for seed in seeds]
        spread = Spread.of(differences)
        if spread.std is None:
            return cls(design, reference, seeds, spread.mean, None, None, None, UNRESOLVED)
        half = student_t(len(seeds) - 1) * spread.std / math.sqrt(len(seeds))
        low, high = spread.mean - half, spread.mean + half
        verdict = UNRESOLVED if low <= 0 <= high else "higher loss" if low > 0 else "lower loss"
        return cls(design, reference, seeds, spread.mean, spread.std, low, high, verdict)

    @property
    def half_width(self) -> float | None:
        """Of the interval: a mean that is not farther from zero is not resolved."""
        return None if self.high is None else self.high - self.mean

    @property
    def resolved(self) -> bool:
        return self.verdict != UNRESOLVED


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of a sample (n - 1 in the denominator); None for a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t for which a Student variable with this many degrees of freedom lies within ±t with this probability.

    By bisection on the exact distribution, a finite sum in the angle atan(t / sqrt(degrees)) (Abramowitz and Stegun,
    26.7.3 and 26.7.4).
    """

    def within(angle: float) -> float:
        odd = degrees % 2
        term, total = math.cos(angle) if odd else 1.0, 0.0
        for k in range(2 + odd, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(middle)
