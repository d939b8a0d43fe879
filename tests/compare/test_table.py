"""The table of made-up results: its figures, and that it claims no more than they show."""

from __future__ import annotations

from crosslayer.compare import format_table
from tests.compare.made_up import made_up


def test_table() -> None:
    text = format_table(
        made_up(
            {
                "MQA": (1536, [3.50, 3.52, 3.54]),
                "CLA2": (768, [3.51, 3.50, 3.56]),
                "worse": (768, [3.60, 3.62, 3.641]),
                "better": (768, [3.40, 3.42, 3.441]),
            }
        )
    )
    rows = {line.split()[0]: line.partition(" ")[2] for line in text.splitlines() if line}
    assert rows["MQA"].split() == ["1,536", "1,536", "1.23", "M", "3.5200", "(3.500–3.540)", "11.47", "1.1733", "1:05"]
    # Differences 0.01, -0.02, 0.02: mean 0.00333, standard deviation 0.02082, times 4.3027 / sqrt(3).
    assert "+0.0033 ±0.0517  not resolved at this size" in rows["CLA2"]
    assert "+0.1003 ±0.0014  higher loss" in rows["worse"]
    assert "−0.0997 ±0.0014  lower loss" in rows["better"]
    assert "Seed noise" in text


def test_one_seed_resolves_nothing() -> None:
    text = format_table(made_up({"MQA": (1536, [3.5]), "CLA2": (768, [9.5])}))
    assert "+6.0000  not resolved at this size" in text
    assert "±" not in text.splitlines()[4]
    assert "cannot be told from one seed" in text
