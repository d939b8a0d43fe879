"""The text drawing: by eye for a few plans, and for all others by reading the plan back from it."""

from __future__ import annotations

import pytest
from hypothesis import given

from crosslayer.plan import SharingPlan, parse_plan
from crosslayer.plan.draw import draw
from tests.plan.plans import NAMED, plans

MIXED = """\
8 layers: 4 own keys and values (■), 4 only read another layer's (□)

layer         window
    0  ■───┐
    1  ■─┐ │       4
    2  □─┘ │       4
    3  □───┘
    4  ■───┐
    5  ■─┐ │       4
    6  □─┘ │       4
    7  □───┘

Prefill fills the whole cache with layers 0 to 5."""

SPLIT = """\
4 layers: 2 own keys or values (■), 2 only read another layer's (□)

layer  keys  values
    0  ■     ■─┐
    1  ■─┐   ■ │
    2  □─┤   □─┤
    3  □─┘   □─┘

Prefill fills the whole cache with layers 0 to 1."""

ABOVE = """\
3 layers: 2 own keys and values (■), 1 only read another layer's (□)

layer
    0  ■
    1  □─┐
    2  ■─┘

Every layer attends to a window of 7 tokens.
Layer 1 reads a layer above it: this plan cannot run in one pass over the layers."""


@pytest.mark.parametrize(
    ("plan", "drawing"),
    [("0,1@4,1@4,0,4,5@4,5@4,4", MIXED), ("0,1,1,1/0,1,0,0", SPLIT), ("0@7,2@7,2@7", ABOVE)],
)
def test_drawings(plan: str, drawing: str) -> None:
    assert draw(SharingPlan.from_list(plan)) == drawing


def sources_of(rows: list[str]) -> tuple[int, ...]:
    """Who reads whom, by following the lines of a drawing from each row's mark."""
    sources = list(range(len(rows)))
    joints = [max((at for at, sign in enumerate(row) if sign in "┐┤┘"), default=0) for row in rows]
    for top, row in enumerate(rows):
        if joints[top] and row[joints[top]] == "┐":
            at = joints[top]
            bottom = next(i for i in range(top, len(rows)) if rows[i][at] == "┘")
            members = [i for i in range(top, bottom + 1) if joints[i] == at]
            assert all(rows[i][at] in "│┼" for i in range(top, bottom) if i not in members)
            (owner,) = [i for i in members if rows[i][0] == "■"]
            for member in members:
                sources[member] = owner
    assert all((rows[i][0] == "■") == (source == i) for i, source in enumerate(sources))
    return tuple(sources)


@given(plans(max_layers=24))
def test_a_drawing_says_all_of_its_plan(plan: SharingPlan) -> None:
    lines = draw(plan).split("\n")
    title, rows = lines[2], lines[3 : 3 + plan.num_layers]
    assert [int(row[:5]) for row in rows] == list(range(plan.num_layers))
    width = max(len(row) for row in [title, *rows])
    rows = [row.ljust(width) for row in rows]
    windows = plan.windows
    if "window" in title:
        at = title.index("window")
        windows = tuple(int(row[at:]) if row[at:].strip() else None for row in rows)
        rows = [row[:at] for row in rows]
    elif "Every layer attends to a window of" in lines[-1] + lines[-2]:
        windows = plan.windows
    else:
        windows = (None,) * plan.num_layers
    if "values" in title:
        middle = title.index("values")
        keys, values = sources_of([row[7:middle] for row in rows]), sources_of([row[middle:] for row in rows])
    else:
        keys = values = sources_of([row[7:] for row in rows])
    assert SharingPlan(keys, values, windows) == plan


@pytest.mark.parametrize("name", NAMED)
def test_84_layers_fit_a_screen(name: str) -> None:
    lines = draw(parse_plan(name, 84)).split("\n")
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    rows = "\n".join(lines[3:])
    assert rows.count("■") + rows.count("□") == (2 * 84 if name == "fusedkv-lite" else 84)
