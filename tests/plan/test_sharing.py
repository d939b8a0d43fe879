"""SharingPlan: its text and JSON forms, its derived facts against their definitions, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import SharingPlan, parse_plan
from tests.plan.plans import plans


@given(plans())
def test_json_text_and_dict_read_back(plan: SharingPlan) -> None:
    assert SharingPlan.from_json(plan.to_json()) == plan
    assert SharingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert parse_plan(str(plan), plan.num_layers) == plan


@given(plans())
def test_owners_and_slots_are_what_the_layers_read(plan: SharingPlan) -> None:
    sources = {"key": plan.key_sources, "value": plan.value_sources}
    streams = {(kind, source) for kind, per_layer in sources.items() for source in per_layer}
    assert {(slot.kind, slot.owner) for slot in plan.slots} == streams
    assert len(plan.slots) == len(streams)
    for slot in plan.slots:
        assert slot.readers == tuple(i for i in range(plan.num_layers) if sources[slot.kind][i] == slot.owner)
        assert slot.owner in slot.readers
    for layer in range(plan.num_layers):
        read_by_others = [
            other
            for per_layer in sources.values()
            for other in range(plan.num_layers)
            if per_layer[other] == layer and other != layer
        ]
        assert plan.shares_slot(layer) == bool(read_by_others)
        assert plan.owns_keys(layer) == (("key", layer) in streams)
        assert plan.owns_values(layer) == (("value", layer) in streams)
    assert plan.owners == tuple(sorted({owner for _, owner in streams}))
    assert plan.is_identity == (len(streams) == 2 * plan.num_layers)
    assert sum(plan.group_sizes) == plan.num_layers


@given(plans(), st.integers(0, 20))
def test_a_slot_stores_every_token_that_a_reader_may_still_look_at(plan: SharingPlan, context: int) -> None:
    for slot in plan.slots:
        visible: set[int] = set()
        for reader in slot.readers:
            window = plan.windows[reader]
            visible |= {t for t in range(context) if window is None or t > context - 1 - window}
        assert slot.capacity(context) == len(visible)


@given(plans())
def test_prefill_cut_and_pipeline_cuts_follow_from_who_reads_whom(plan: SharingPlan) -> None:
    reads = {
        (layer, source)
        for per_layer in (plan.key_sources, plan.value_sources)
        for layer, source in enumerate(per_layer)
    }
    assert plan.readers_below_owner == tuple(sorted({layer for layer, source in reads if source > layer}))
    if plan.readers_below_owner:
        assert plan.prefill_cut == plan.num_layers
    else:
        # The layers below the cut write every slot, and one layer fewer would not.
        written = [{source for _, source in reads if source < cut} for cut in range(plan.num_layers + 1)]
        assert plan.prefill_cut == min(cut for cut, slots in enumerate(written) if len(slots) == len(written[-1]))
    straddled = {cut for layer, source in reads for cut in range(min(layer, source) + 1, max(layer, source) + 1)}
    assert plan.pipeline_cuts == tuple(cut for cut in range(1, plan.num_layers) if cut not in straddled)


@given(plans())
def test_unshared_keeps_only_the_windows(plan: SharingPlan) -> None:
    assert plan.unshared.is_identity
    assert plan.unshared.windows == plan.windows


def test_a_plan_cannot_be_changed_and_is_its_contents() -> None:
    plan = SharingPlan((0, 0, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.key_sources = (0, 1, 2)  # type: ignore[misc]
    assert plan == SharingPlan([0, 0, 2], [0, 0, 2], [None] * 3)  # type: ignore[arg-type]
    assert len({plan, SharingPlan((0, 0, 2)), SharingPlan((0, 0, 2), windows=(4, 4, 4))}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "at least one layer"),
        (((0, 0, 1),), "layer 2 reads the keys of layer 1, but layer 1 owns none"),
        (((0, 1), (0, 2)), "layer 1: value source 2 is outside"),
        (((0, -1),), "layer 1: key source -1 is outside"),
        (((0, "1"),), "layer 1: key source must be a layer number"),
        (((0, True),), "layer 1: key source must be a layer number"),
        (((0, 0), (0,)), "key_sources has 2 layers but value_sources has 1"),
        (((0, 0), (), (4,)), "key_sources has 2 layers but windows has 1"),
        (((0, 0), (), (4, 0)), "layer 1: window must be a positive number"),
        (((0, 0), (), (2.5, None)), "layer 0: window must be a positive number"),
    ],
)
def test_an_impossible_plan_is_refused_by_name(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SharingPlan(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[0, 0]", "must be an object"),
        ('{"value_sources": [0]}', "key_sources is missing"),
        ('{"key_sources": [0], "window": [4]}', "unknown key 'window'"),
        ('{"key_sources": "00"}', "key_sources must be a list"),
    ],
)
def test_json_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SharingPlan.from_json(text)


@pytest.mark.parametrize("text", ["0,x", "0,0@", "0,,0", "0,0/0@4,0"])
def test_a_list_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="plan"):
        SharingPlan.from_list(text)
