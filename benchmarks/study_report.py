"""What the runs of the study say: docs/results/study.jsonl as tables and a plot in docs/study.md.

    python -m benchmarks.study_report

Replaces what stands between the two marker lines of docs/study.md, and docs/images/study-pareto.png. Only runs of the
models and the recipe of configs/study/compare.yaml count, whatever their seed and learning rate; a design is shown at
the rate that has the lowest held-out loss with its first seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study import CONFIG, RESULTS, ROOT, comparable, read_rows
from benchmarks.study_plot import draw
from crosslayer.compare import CompareConfig
from crosslayer.compare.plots import to_png
from crosslayer.compare.statistics import Difference, Spread, measure_noise
from crosslayer.compare.table import describe_noise, format_bytes_per_token, format_difference
from crosslayer.errors import UserError
from crosslayer.settings import load_settings

CORPUS = "crosslayer study corpus 2026-11"
PAGE = ROOT / "docs" / "study.md"
PLOT = ROOT / "docs" / "images" / "study-pareto.png"
BEGIN, END = "<!-- begin: benchmarks/study_report.py -->", "<!-- end -->"

# What is set against what: a question, and pairs of a design and its reference.
QUESTIONS = {
    "Equal cache: sharing, or smaller heads": [
        ("H256-MQA-CLA2", "H128-MQA"),
        ("H128-MQA-CLA2", "H64-MQA"),
        ("H64-MQA-CLA2", "H32-MQA"),
        ("H32-MQA-CLA2", "H16-MQA"),
        ("H128-MQA-CLA4", "H32-MQA"),
    ],
    "Equal cache and equal parameters": [
        ("H128-MQA-CLA2-wide", "H64-MQA-wide"),
        ("H128-GQA2-CLA2", "H64-GQA2"),
    ],
    "Half the cache by sharing": [
        ("H128-MQA-CLA2", "H128-MQA"),
        ("H64-MQA-CLA2", "H64-MQA"),
        ("H32-MQA-CLA2", "H32-MQA"),
        ("H128-GQA2-CLA2", "H128-GQA2"),
    ],
    "Half the cache by sharing, equal parameters": [
        ("H128-MQA-CLA2-wide", "H128-MQA"),
        ("H64-MQA-CLA2-wide", "H64-MQA-wide"),
    ],
    "Larger groups against CLA2": [
        ("H128-MQA-CLA4", "H64-MQA-CLA2"),
        ("H128-MQA-CLA3", "H128-MQA-CLA2"),
    ],
    "Other patterns, with a sixth more cache, against CLA2": [
        ("H128-MQA-CLA2-KeepEnds", "H128-MQA-CLA2"),
        ("H128-MQA-CLA2-DenseFront", "H128-MQA-CLA2"),
        ("H128-MQA-CLA2-DenseBack", "H128-MQA-CLA2"),
    ],
    "Other layouts of the same cache against CLA2": [
        ("H128-MQA-pizza-bottom:6", "H128-MQA-CLA2"),
        ("H128-MQA-sandwich-bottom:6", "H128-MQA-CLA2"),
        ("H128-MQA-sandwich-middle:6", "H128-MQA-CLA2"),
        ("H128-MQA-fusedkv-lite", "H128-MQA-CLA2"),
        ("H128-GQA2-suffix:6,window=256,period=3", "H128-MQA-CLA2"),
        ("H128-GQA2-yoco:window=341", "H128-MQA-CLA2"),
    ],
}


@dataclass(frozen=True)
class Arm:
    """A design at its best learning rate: a row of the results for each seed there, and the loss of its first seed at
    every rate that was tried."""

    design: str
    rate: float
    rows: dict[int, dict[str, Any]]
    tried: dict[float, float]

    @property
    def losses(self) -> dict[int, float]:
        return {seed: row["validation"]["loss"] for seed, row in self.rows.items()}

    @property
    def loss(self) -> Spread:
        return Spread.of(list(self.losses.values()))

    @property
    def first(self) -> dict[str, Any]:
        return next(iter(self.rows.values()))

    @property
    def kv_bytes(self) -> int | float:
        """Of a token, at the trained length; a whole number unless some layers keep a window only."""
        count = float(self.first["kv_bytes_per_token"])
        return int(count) if count.is_integer() else count

    def mean(self, *path: str) -> float:
        """Over seeds, of the figure at this place of a row."""
        return sum(_at(row, path) for row in self.rows.values()) / len(self.rows)


def gather(config: CompareConfig, rows: Sequence[dict[str, Any]]) -> list[Arm]:
    """The arms that have runs, in the order of the config's designs.

    Raises:
        UserError: their data are not the same.
    """
    arms = []
    for design in config.designs:
        settings = comparable(config.training(design, 0))
        own = [row for row in rows if "validation" in row and _same(row["settings"], settings)]
        if not own:
            continue
        first_seed = min(row["seed"] for row in own)
        tried = {row["learning_rate"]: row["validation"]["loss"] for row in own if row["seed"] == first_seed}
        rate = min(tried, key=tried.__getitem__)
        at_rate = sorted((row for row in own if row["learning_rate"] == rate), key=lambda row: row["seed"])
        arms.append(Arm(design, rate, {row["seed"]: row for row in at_rate}, dict(sorted(tried.items()))))
    data = {row["settings"]["data"] for arm in arms for row in arm.rows.values()}
    if len(data) > 1:
        raise UserError(f"the results hold runs on different data: {', '.join(sorted(data))}")
    return arms


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    def recipe(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings["train"].items() if key not in ("seed", "learning_rate")}

    return bool(found["model"] == wanted["model"] and recipe(found) == recipe(wanted))


def _at(row: Any, path: Iterable[str]) -> float:
    for key in path:
        row = row[key]
    return float(row)


def render(arms: Sequence[Arm], rows: Sequence[dict[str, Any]]) -> str:
    """The part of docs/study.md that is made from the results."""
    if not arms:
        return "No runs yet."
    differences = {
        (design, reference): found
        for pairs in QUESTIONS.values()
        for design, reference in pairs
        if (found := _difference(arms, design, reference)) is not None
    }
    parts = [_summary(rows), _main_table(arms), _noise(arms, differences)]
    parts += ["![Held-out loss against KV bytes per token](images/study-pareto.png)", _pairs_table(differences)]
    if any(row["tasks"] for arm in arms for row in arm.rows.values()):
        parts.append(_tasks_table(arms))
    return "\n\n".join([*parts, _recall_table(arms), _rates_table(arms)])


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    finished = [row for row in rows if "validation" in row]
    tokens = sum(row["tokens"] for row in finished)
    minutes = sum(row["seconds"] + row["evaluation_seconds"] for row in finished) / 60
    machines = sorted({row["environment"]["gpu"] or row["environment"]["processor"] for row in finished})
    dates = sorted(row["environment"]["time"][:10] for row in finished)
    diverged = len(rows) - len(finished)
    return (
        f"{len(finished)} runs, {tokens / 1e9:.2f} billion tokens of the {CORPUS}, {minutes:.0f} minutes of training "
        f"and evaluation on {', '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        + (f"; {diverged} more did not finish." if diverged else ".")
    )


def _main_table(arms: Sequence[Arm]) -> str:
    rows = []
    for arm in arms:
        loss, row = arm.loss, arm.first
        spread = "" if loss.std is None else f" ({loss.low:.4f}–{loss.high:.4f})"
        cells = [f"`{arm.design}`", format_bytes_per_token(arm.kv_bytes), f"{row['parameters'] / 1e6:.2f} M"]
        cells += [f"{arm.rate:g}", str(len(arm.rows)), f"{loss.mean:.4f}{spread}"]
        cells += [_plus_minus(row["validation"]["standard_error"], 3), f"{math.exp(loss.mean):.2f}"]
        rows.append([*cells, f"{arm.mean('validation', 'bits_per_byte'):.4f}"])
    heads = ["design", "KV bytes per token", "parameters", "rate", "seeds", "held-out loss: mean (range)"]
    return _table([*heads, "s.e. over documents", "perplexity", "bits per byte"], rows)


def _noise(arms: Sequence[Arm], differences: dict[tuple[str, str], Difference]) -> str:
    noise = measure_noise([arm.losses for arm in arms], differences.values())
    return " ".join(describe_noise(noise))


def _difference(arms: Sequence[Arm], design: str, reference: str) -> Difference | None:
    found = {arm.design: arm.losses for arm in arms}
    if design not in found or reference not in found:
        return None
    return Difference.between(design, found[design], reference, found[reference])


def _pairs_table(differences: dict[tuple[str, str], Difference]) -> str:
    rows = []
    for question, pairs in QUESTIONS.items():
        for pair in pairs:
            if (found := differences.get(pair)) is not None:
                cells = [question, f"`{pair[0]}`", f"`{pair[1]}`", format_difference(found), str(len(found.seeds))]
                rows.append([*cells, found.verdict])
                question = ""
    return _table(["question", "design", "against", "difference of loss ± 95%", "seeds", "verdict"], rows)


def _tasks_table(arms: Sequence[Arm]) -> str:
    """Means over seeds ± standard error over items of one model; chance in the head."""
    columns: dict[tuple[str, str], float | None] = {}
    for arm in arms:
        for task, score in arm.first["tasks"].items():
            for name, metric in score["metrics"].items():
                columns[task, name] = metric["chance"]
    rows = []
    for arm in arms:
        cells = [f"`{arm.design}`"]
        for task, name in columns:
            if not all(name in row["tasks"].get(task, {"metrics": {}})["metrics"] for row in arm.rows.values()):
                cells.append("–")
                continue
            value = arm.mean("tasks", task, "metrics", name, "value")
            error = arm.first["tasks"][task]["metrics"][name]["standard_error"]
            digits = 1 if value > 10 else 3
            cells.append(f"{value:.{digits}f} {_plus_minus(error, digits)}")
        rows.append(cells)
    heads = [f"{task} {name}" + (f" (chance {c:.2f})" if c else "") for (task, name), c in columns.items()]
    return _table(["design", *heads], rows)


def _recall_table(arms: Sequence[Arm]) -> str:
    """Accuracy and gain, means over seeds and over depths; the farthest distance by itself."""
    lengths = sorted({result["length"] for result in arms[0].first["recall"]}, reverse=True)
    rows = []
    for arm in arms:
        cells = [f"`{arm.design}`"]
        for length in lengths:
            every = [r for row in arm.rows.values() for r in row["recall"] if r["length"] == length]
            farthest = [r for r in every if r["depth"] == 0]
            for results in (every, farthest):
                accuracy, gain = (sum(r[name] for r in results) / len(results) for name in ("accuracy", "gain"))
                cells.append(f"{accuracy:.3f}, {gain:.3f}")
        rows.append(cells)
    chance = arms[0].first["recall"][0]["chance"]
    heads = [head for n in lengths for head in (f"recall in {n} tokens: accuracy, gain", f"from the start of {n}")]
    return _table(["design", *heads], rows) + f"\n\nAccuracy of guessing: {chance:.4f}. Gain in nats a word."


def _rates_table(arms: Sequence[Arm]) -> str:
    rates = sorted({rate for arm in arms for rate in arm.tried})
    rows = [
        [f"`{arm.design}`", *(f"{arm.tried[rate]:.4f}" if rate in arm.tried else "" for rate in rates)] for arm in arms
    ]
    return _table(["held-out loss of the first seed at rate", *(f"{rate:g}" for rate in rates)], rows)


def _plus_minus(error: float | None, digits: int) -> str:
    return "" if error is None else f"±{error:.{digits}f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = read_rows(RESULTS)
    arms = gather(load_settings(CompareConfig, CONFIG), rows)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{render(arms, rows)}\n\n{END}{after}", encoding="utf-8")
    if arms:
        title = f"{CORPUS}, {arms[0].first['tokens'] / 1e6:.0f}M tokens: mean and range over seeds"
        PLOT.write_bytes(to_png(draw([(arm.kv_bytes, arm.loss, arm.design) for arm in arms], title)))
    print(f"{len(arms)} designs from {len(rows)} runs: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
