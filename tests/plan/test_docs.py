"""docs/designs.md: every design is in it, its strings parse, and its drawings are those of today's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crosslayer.plan import DESIGNS, ModelConfig, notations, parse_design, parse_plan
from crosslayer.plan.draw import draw

TEXT = (Path(__file__).parents[2] / "docs" / "designs.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL) if block.startswith("layer")]


def side_by_side(names: list[str], layers: int) -> str:
    """The drawings of several plans in columns, without their titles and notes."""
    columns = [[line[7:] for line in draw(parse_plan(name, layers)).split("\n")[3 : 3 + layers]] for name in names]
    widths = [max(map(len, [name, *column])) for name, column in zip(names, columns, strict=True)]
    rows = [["layer", *(name.ljust(width) for name, width in zip(names, widths, strict=True))]]
    for layer in range(layers):
        cells = (column[layer].ljust(width) for column, width in zip(columns, widths, strict=True))
        rows.append([str(layer).rjust(5), *cells])
    return "\n".join("   ".join(row).rstrip() for row in rows) + "\n"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[1])
def test_drawings_are_up_to_date(block: str) -> None:
    names = block.split("\n")[0].split()[1:]
    assert block == side_by_side(names, block.count("\n") - 1)


def test_there_are_drawings() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.pattern)
def test_every_design_has_a_row_with_a_string_that_parses(design: object) -> None:
    pattern = design.pattern  # type: ignore[attr-defined]
    (row,) = re.findall(rf"^\| `{pattern}` .*$", TEXT, re.MULTILINE)
    (example,) = re.findall(r"`([^`]+)` \|$", row)
    base = ModelConfig(8, 8, 8, num_hidden_layers=12, num_attention_heads=1)
    assert re.match(pattern.replace("N", r"\d+"), example)
    assert parse_design(f"MQA-{example}", base).plan == parse_plan(example, 12)


@pytest.mark.parametrize("name", [name for name in dir(notations) if name.startswith("to_")])
def test_every_notation_has_a_row(name: str) -> None:
    assert f"`{name}`" in TEXT
