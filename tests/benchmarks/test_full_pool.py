"""Whoever waits for a full cache is not let in only to give way, nor kept out for nothing."""

from __future__ import annotations

import pytest

from benchmarks.full_pool import Load, keeping_none_free, simulate


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(50, 150, 600, 1000), id="many short ones"),
        pytest.param(Load(150, 450, 600, 400), id="some longer ones"),
        pytest.param(Load(1000, 3000, 3000, 150), id="thirty long ones"),
    ],
)
def test_few_are_computed_again_and_hardly_fewer_run(load: Load) -> None:
    kept = simulate(load)
    with keeping_none_free():
        none = simulate(load)
    assert 0 < kept.preemptions < none.preemptions / 4
    assert kept.repeated < none.repeated / 4
    assert kept.running > 0.95 * none.running


def test_alone_everything_fits_and_nothing_is_computed_again() -> None:
    """Also what takes up the whole pool, so that others have to wait."""
    longest = 320  # prompt and answer: 20 blocks of 32, the last token of which is not fed
    outcome = simulate(Load(longest, longest, 20, 5))
    assert outcome.preemptions == 0
    assert outcome.repeated == 0
    assert outcome.running == 1
