"""The named designs, against what their papers and the projects that use them say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import DESIGNS, SharingPlan, parse_plan
from crosslayer.plan.notations import from_lckv
from tests.plan.plans import NAMED


def lckv_22(layer_types: str) -> SharingPlan:
    """A plan in the notation of the LCKV project, whose README lists several for 22 layers."""
    return from_lckv({"num_hidden_layers": 22, "layer_types": layer_types, "sliding_window": 1024})


@pytest.mark.parametrize(
    ("design", "readme"),
    [
        ("identity", "0_1_2_3_4_5_6_7_8_9_10_11_12_13_14_15_16_17_18_19_20_21"),
        ("cla2", "0_0_2_2_4_4_6_6_8_8_10_10_12_12_14_14_16_16_18_18_20_20"),
        ("lckv", "0_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_20_21"),
        ("sandwich-middle:kv=3", "0_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_10_21"),
        ("yoco", "0s_1s_2s_3s_4s_5s_6s_7s_8s_9s_10s_11_11_11_11_11_11_11_11_11_11_11"),
        ("mixattention", "0_1s_1s_3s_3s_3s_0_7s_7s_9s_9s_9s_12_13s_13s_15s_15s_15s_12_19s_19s_19s"),
    ],
)
def test_designs_are_those_that_lckv_lists_for_22_layers(design: str, readme: str) -> None:
    assert parse_plan(design, 22) == lckv_22(readme)


def sources(design: str, layers: int) -> tuple[int, ...]:
    plan = parse_plan(design, layers)
    assert plan.value_sources == plan.key_sources
    assert set(plan.windows) == {None}
    return plan.key_sources


def test_the_paper_s_patterns_at_20_layers() -> None:
    """arXiv 2405.12981, table 1 and the figure of a 10-layer CLA3 model."""
    assert sources("cla2", 20) == tuple(layer // 2 * 2 for layer in range(20))
    assert sources("cla3", 10) == (0, 1, 1, 1, 4, 4, 4, 7, 7, 7)
    assert sources("cla3:rest=last", 10) == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9)
    assert len(set(sources("cla3", 20))) == 7
    assert len(set(sources("cla4", 20))) == 5
    assert sources("cla2-keepends", 20) == (0, *(layer // 2 * 2 + 1 for layer in range(18)), 19)
    assert sources("cla2-keepends", 7) == (0, 1, 2, 2, 4, 4, 6)
    assert sources("cla2-densefront", 20) == (*range(10), *[9] * 9, 19)
    assert sources("cla2-denseback", 20) == (0, *[1] * 10, *range(11, 20))


def test_the_siblings_at_12_layers() -> None:
    assert sources("mlkv:3", 12) == (0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8)
    assert sources("suffix:5", 12) == (0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6)
    assert sources("pizza-bottom:kv=4", 12) == (0, 1, 2, *[3] * 9)
    assert sources("pizza-middle:kv=4", 12) == (0, 1, 2, *[7] * 9)
    assert sources("sandwich-bottom:kv=4", 12) == (0, 1, *[2] * 9, 11)
    assert sources("lasagna-bottom:kv=4", 12) == (0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9)
    assert sources("lasagna-middle:kv=4", 12) == (1, 1, 1, 4, 4, 4, 7, 7, 7, 10, 10, 10)
    lite = parse_plan("fusedkv-lite", 12)
    assert lite.key_sources == (0, 1, 2, 3, 4, 5, *[5] * 6)
    assert lite.value_sources == (0, 1, 2, 3, 4, 5, *[0] * 6)


def test_relations_that_the_papers_state() -> None:
    assert parse_plan("cla2", 22) == parse_plan("lasagna-bottom:kv=11", 22)  # CLA2 is lasagna-bottom
    assert parse_plan("lckv", 22).readers_below_owner == tuple(range(1, 20))
    yoco = parse_plan("yoco:window=64", 32)
    assert (yoco.prefill_cut, yoco.group_sizes[-1]) == (17, 16)  # prefill: the lower half, and the layer that makes K/V
    afm = parse_plan("suffix:21", 56)
    assert 1 - len(afm.owners) / 56 == 0.375


@given(st.sampled_from(NAMED), st.integers(1, 40))
def test_a_design_fits_its_depth_or_says_why_not(name: str, layers: int) -> None:
    try:
        plan = parse_plan(name, layers)
    except UserError:
        with pytest.raises(UserError, match=rf"\b{layers}\b"):
            parse_plan(name, layers)
    else:
        assert plan.num_layers == layers
        assert parse_plan(name.upper(), layers) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cla2-keepend", "did you mean 'cla2-keepends'"),
        ("yocco", "did you mean 'yoco'"),
        ("cla", "did you mean 'cla2'"),
        ("nothing-like-it", "known: identity, claN"),
        ("cla0", "at least 1"),
        ("cla2:first=rest", "no argument 'first'; it takes rest"),
        ("cla3:rest=middle", "first or last"),
        ("identity:3", "at most 0 arguments"),
        ("mlkv", "needs layers"),
        ("mlkv:7", "do not divide 20"),
        ("yoco:window=-4", "must be a positive whole number"),
        ("suffix:4,shared=5", "given twice"),
        ("suffix:20", "layer 0 has no layer"),
        ("pizza-bottom:kv=21", "between 1 and 20"),
        ("0,0,2,2", "lists 4 layers, but the model has 20"),
    ],
)
def test_a_wrong_design_is_refused_with_what_would_be_right(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_plan(text, 20)


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.pattern)
def test_every_design_says_what_it_is_and_where_it_comes_from(design: object) -> None:
    assert design.summary.endswith(".")  # type: ignore[attr-defined]
    assert design.source  # type: ignore[attr-defined]
