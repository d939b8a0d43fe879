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


def test_noise_is_each_designs_and_each_pairs_own() -> None:
    """Not that of a pool of designs, nor of the pair with the most seeds. By hand, with t of 4.3027 for three seeds and
    12.706 for two: `few` is higher than `steady` by 0 and 0.01, than `wild` by 0 and -0.18, and `wild` than `steady` by
    0, 0.19 and 0.08; half the intervals are 0.0635, 1.1436 and 0.2370."""
    losses = {"steady": [1.0, 1.01, 1.02], "wild": [1.0, 1.2, 1.1], "few": [1.0, 1.02], "once": [9.0]}
    text = " ".join(format_table(made_up({name: (96, found) for name, found in losses.items()})).split())
    assert (
        "Seed noise: over seeds, the loss of a design has a standard deviation of 0.0100 (steady) to 0.1000 (wild). "
        "A difference shows where it is larger than the ± of its own interval, 0.0635 (few against steady) to 1.1436 "
        "(few against wild)." in text
    )
    alone = " ".join(format_table(made_up({"wild": (96, losses["wild"])})).split())
    assert alone.endswith("a standard deviation of 0.1000 (wild).")
    two = format_table(made_up({name: (96, losses[name]) for name in ("steady", "wild")}))
    assert " ".join(two.split()).endswith("its own interval, 0.2370 (wild against steady).")


def test_one_seed_resolves_nothing() -> None:
    text = format_table(made_up({"MQA": (1536, [3.5]), "CLA2": (768, [9.5])}))
    assert "+6.0000  not resolved at this size" in text
    assert "±" not in text.splitlines()[4]
    assert "cannot be told from one seed" in text
