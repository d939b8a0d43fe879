"""Any backward plan, any schedule: cached equals uncached, and both are the definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.model import ContiguousCache
from crosslayer.plan import SharingPlan
from tests.conftest import tiny_config
from tests.model.checks import assert_close, packed_documents, random_model, random_tokens, reference

Draw = Callable[[st.SearchStrategy], object]


@st.composite
def backward_plans(draw: Draw, max_layers: int = 5) -> SharingPlan:
    """Every layer reads the keys of itself or of any owner below it, likewise values, through any window."""
    layers = draw(st.integers(1, max_layers))
    sources: list[list[int]] = [[], []]
    for layer in range(layers):
        for kind in sources:
            owners = sorted({*kind, layer})
            kind.append(draw(st.sampled_from(owners)))
    windows = draw(st.lists(st.sampled_from([None, None, 1, 2, 3, 5, 8]), min_size=layers, max_size=layers))
    return SharingPlan(tuple(sources[0]), tuple(sources[1]), tuple(windows))


def servable(plan: SharingPlan, max_length: int) -> SharingPlan:
    """The plan, or one with values read from the keys' sources where a cache cannot line up the two."""
    try:
        ContiguousCache(tiny_config(plan), 1, max_length)
    except UserError:
        return SharingPlan(plan.key_sources, windows=plan.windows)
    return plan


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_ragged_cached_runs_equal_uncached_ones(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3), label="rows")
    schedule = data.draw(
        st.lists(st.lists(st.integers(0, 7), min_size=rows, max_size=rows).filter(any), min_size=1, max_size=5),
        label="new tokens per step and row",
    )
    totals = torch.tensor(schedule).sum(dim=0).tolist()
    max_length = max(totals) + data.draw(st.integers(0, 3), label="spare room")
    model = random_model(tiny_config(servable(data.draw(backward_plans(), label="plan"), max_length)))
    tokens = random_tokens(model, rows, max(totals))
    with torch.no_grad():
        expected = model(tokens)
        cache = ContiguousCache(model.config, rows, max_length)
        done = [0] * rows
        for step in schedule:
            columns = torch.zeros(rows, max(step), dtype=torch.int64)
            for row, new in enumerate(step):
                columns[row, :new] = tokens[row, done[row] : done[row] + new]
            logits = model(columns, cache=cache, new_lengths=torch.tensor(step))
            for row, new in enumerate(step):
                if new:
                    place = slice(done[row], done[row] + new)
                    assert_close(logits[row, :new], expected[row, place], f"row {row}, tokens {place}")
                done[row] += new


@settings(max_examples=15, deadline=None, derandomize=True)
@given(plan=backward_plans(max_layers=4))
def test_uncached_runs_are_the_definition(plan: SharingPlan) -> None:
    model = random_model(tiny_config(plan))
    reference(model)
    packed_documents(model)
