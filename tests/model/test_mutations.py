"""The checks have teeth: each notices the faults that it is there for, and nothing else trips them."""

from __future__ import annotations

import pytest

from tests.conftest import tiny_config
from tests.model.checks import CHECKS, random_model
from tests.model.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_fault_is_noticed(mutation: Mutation) -> None:
    assert mutation.caught_by
    for check in mutation.caught_by:
        CHECKS[check](random_model(tiny_config(mutation.plan)))  # passes without the fault
        with mutation.applied(), pytest.raises(AssertionError):
            CHECKS[check](random_model(tiny_config(mutation.plan)))


def test_every_check_has_a_fault_that_it_notices() -> None:
    assert set(CHECKS) == {check for mutation in MUTATIONS for check in mutation.caught_by}
