"""Pipeline stages against all ways to cut a plan, and the reasons why there is none."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import SharingPlan, parse_plan
from crosslayer.plan.pipeline import check_cut, pipeline_stages
from tests.plan.plans import plans


@given(plans(), st.integers(1, 5))
def test_stages_are_the_most_even_of_all_that_keep_readers_and_owners_together(plan: SharingPlan, stages: int) -> None:
    layers = plan.num_layers
    costs = []
    for cuts in combinations(range(1, layers), stages - 1):
        stage_of = [sum(cut <= layer for cut in cuts) for layer in range(layers)]
        pairs = zip(plan.key_sources, plan.value_sources, strict=True)
        if all(stage_of[source] == stage_of[layer] for layer, pair in enumerate(pairs) for source in pair):
            costs.append(sum((stop - start) ** 2 for start, stop in pairwise((0, *cuts, layers))))
    if not costs:
        with pytest.raises(UserError, match="pipeline stages"):
            pipeline_stages(plan, stages)
        return
    found = pipeline_stages(plan, stages)
    assert [layer for stage in found for layer in stage] == list(range(layers))
    assert len(found) == stages
    assert sum(len(stage) ** 2 for stage in found) == min(costs)
    for stage in found[1:]:
        check_cut(plan, stage.start)


@pytest.mark.parametrize(
    ("plan", "cut", "message"),
    [
        ("cla2", 3, "a pipeline cut before layer 3: layer 3 reads the keys of layer 2"),
        ("0,1,2,3/0,1,2,1", 2, "a pipeline cut before layer 2: layer 3 reads the values of layer 1"),
        ("cla2", 0, "a pipeline cut must lie between 1 and 5, got 0"),
    ],
)
def test_a_cut_through_a_group(plan: str, cut: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cut(parse_plan(plan, 6 if plan == "cla2" else 4), cut)


def test_why_there_are_not_enough_cuts() -> None:
    with pytest.raises(
        UserError, match=r"3 pipeline stages need 2 cuts; legal are: 3 \(.*layer 1 reads the keys of la"
    ):
        pipeline_stages(parse_plan("cla3", 6), 3)
    with pytest.raises(UserError, match="from 1 to the 6 layers, got 7"):
        pipeline_stages(parse_plan("cla2", 6), 7)
