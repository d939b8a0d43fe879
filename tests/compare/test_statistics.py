"""Spreads, paired differences and their intervals, against published tables, hand calculation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crosslayer.compare.statistics import UNRESOLVED, Difference, Spread, student_t


# Two-sided quantiles from published tables of Student's distribution.
@pytest.mark.parametrize(
    ("degrees", "confidence", "expected"),
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (5, 0.95, 2.571),
        (9, 0.95, 2.262),
        (30, 0.95, 2.042),
        (120, 0.95, 1.980),
        (1, 0.99, 63.657),
        (2, 0.99, 9.925),
        (7, 0.99, 3.499),
        (6, 0.5, 0.718),
    ],
)
def test_student_t_against_tables(degrees: int, confidence: float, expected: float) -> None:
    assert student_t(degrees, confidence) == pytest.approx(expected, abs=6e-4)


def test_student_t_approaches_the_normal_distribution() -> None:
    assert student_t(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_difference_is_paired_by_seed() -> None:
    """Seed by seed the second is 0.1, 0.2, 0.3 higher, though the seeds themselves lie far apart."""
    reference = {4: 3.0, 7: 5.0, 9: 1.0, 11: 9.9}
    losses = {9: 1.2, 7: 5.3, 4: 3.1}
    difference = Difference.between("b", losses, "a", reference)
    assert difference is not None
    assert set(difference.seeds) == {4, 7, 9}
    assert difference.mean == pytest.approx(0.2)
    assert difference.std == pytest.approx(0.1)
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert difference.low == pytest.approx(0.2 - half, abs=1e-4)
    assert difference.high == pytest.approx(0.2 + half, abs=1e-4)
    assert difference.half_width == pytest.approx(half, abs=1e-4)
    assert difference.verdict == UNRESOLVED == "not resolved at this size"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.10, 0.11, 0.12], "higher loss"),
        ([-0.10, -0.11, -0.12], "lower loss"),
        ([0.10, -0.01, 0.12], UNRESOLVED),
        ([0.10, 0.90], UNRESOLVED),  # two seeds: the interval is 12.7 standard errors wide on either side
        ([5.0], UNRESOLVED),  # one seed never resolves anything
        ([0.0, 0.0, 0.0], UNRESOLVED),
    ],
)
def test_verdict(differences: list[float], verdict: str) -> None:
    base = {seed: 2.0 + seed for seed in range(len(differences))}
    difference = Difference.between("b", {s: base[s] + d for s, d in enumerate(differences)}, "a", base)
    assert difference is not None
    assert difference.verdict == verdict
    assert (difference.low is None) == (len(differences) == 1)


def test_no_seed_in_common() -> None:
    assert Difference.between("b", {0: 1.0}, "a", {1: 1.0}) is None
    assert Difference.between("b", {}, "a", {1: 1.0}) is None


def test_intervals_of_equal_designs_exclude_zero_one_time_in_twenty() -> None:
    generator = np.random.default_rng(0)
    resolved, trials = 0, 2000
    for _ in range(trials):
        seeds = generator.normal(3.5, 1.0, size=3)  # what both have in common does not widen the interval
        a, b = (dict(enumerate((seeds + generator.normal(0, 0.02, size=3)).tolist())) for _ in "ab")
        difference = Difference.between("b", b, "a", a)
        assert difference is not None
        assert difference.high is not None
        assert difference.high - difference.mean < 1.0
        resolved += difference.resolved
    assert 0.035 < resolved / trials < 0.065


def test_spread_against_numpy() -> None:
    values = [3.5, 3.4, 3.75, 3.6]
    spread = Spread.of(values)
    assert (spread.low, spread.high) == (3.4, 3.75)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.std == pytest.approx(np.std(values, ddof=1))
    assert Spread.of([3.5]).std is None
