"""What the runs of the study say: docs/results/study.jsonl as tables and a plot in docs/study.md.

    python -m benchmarks.study_report

Replaces what stands between the two marker lines of docs/study.md, and the plots docs/images/study-*.png. Only runs of
the models and the recipe of configs/study/compare.yaml count, whatever their seed and learning rate; a design is shown
at the rate that has the lowest held-out loss with its first seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean
from typing import Any

from benchmarks.study import CONFIG, RESULTS, ROOT, comparable, read_rows
from benchmarks.study_plot import draw, draw_layouts
from crosslayer.compare import CompareConfig
from crosslayer.compare.plots import to_png
from crosslayer.compare.statistics import CONFIDENCE, Difference, Spread
from crosslayer.compare.table import NONE, describe_noise, format_bytes_per_token, format_difference
from crosslayer.errors import UserError
from crosslayer.settings import load_settings

CORPUS = "crosslayer study corpus 2026-11"
PAGE = ROOT / "docs" / "study.md"
PLOT = ROOT / "docs" / "images" / "study-pareto.png"
LAYOUTS_PLOT = ROOT / "docs" / "images" / "study-layouts.png"
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
    "Cache within 2%: sharing, or smaller heads": [
        ("H128-MQA-CLA3", "H42-MQA"),  # no even head size has the bytes of CLA3
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
    "Equal cache: larger groups, or CLA2 with smaller heads": [
        ("H128-MQA-CLA4", "H64-MQA-CLA2"),
    ],
    "A third less cache, by groups of three": [
        ("H128-MQA-CLA3", "H128-MQA-CLA2"),
    ],
    "Half the cache, by groups of four": [
        ("H128-MQA-CLA4", "H128-MQA-CLA2"),
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
        ("H128-GQA2-suffix:6,window=256,period=3", "H128-MQA-CLA2-wide"),
        ("H128-GQA2-yoco:window=341", "H128-MQA-CLA2"),
        ("H128-GQA2-yoco:window=341", "H128-MQA-CLA2-wide"),
    ],
}
PAIR_HEADS = ("question", "design", "against")
# Later seeds were added where these had not resolved a pair, so they must also be seen by themselves.
FIRST_SEEDS = (0, 1, 2)
# The scores of a run, by the heads of their columns.
Scores = Callable[[dict[str, Any]], dict[str, float]]


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

    def scores(self, head: str, scores: Scores) -> dict[int, float]:
        """One of the scores by seed, of the seeds that have it."""
        return {seed: found[head] for seed, row in self.rows.items() if head in (found := scores(row))}


@dataclass(frozen=True)
class Pair:
    """A design and what it is set against to answer a question; they have a seed in common."""

    question: str
    design: Arm
    reference: Arm

    @property
    def loss(self) -> Difference:
        found = self._difference(self.design.losses, self.reference.losses)
        assert found is not None  # a common seed
        return found

    @property
    def later_loss(self) -> Difference | None:
        """By the seeds behind the first alone."""
        own, other = (
            {seed: loss for seed, loss in arm.losses.items() if seed not in FIRST_SEEDS}
            for arm in (self.design, self.reference)
        )
        return self._difference(own, other)

    def score(self, head: str, scores: Scores) -> Difference | None:
        """The difference of one of the scores; None where they have no seed with it in common."""
        return self._difference(self.design.scores(head, scores), self.reference.scores(head, scores))

    def _difference(self, own: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
        return Difference.between(self.design.design, own, self.reference.design, other)

    def cells(self) -> list[str]:
        return [self.question, f"`{self.design.design}`", f"`{self.reference.design}`"]


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


def task_scores(row: dict[str, Any]) -> dict[str, float]:
    return {head: metric["value"] for head, metric in _metrics(row).items()}


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{task} {name}" + (f" (chance {metric['chance']:.2f})" if metric["chance"] else ""): metric
        for task, score in row["tasks"].items()
        for name, metric in score["metrics"].items()
    }


def recall_scores(row: dict[str, Any]) -> dict[str, float]:
    """Means over depths; the farthest distance by itself."""
    found = {}
    for length in sorted({result["length"] for result in row["recall"]}, reverse=True):
        every = [result for result in row["recall"] if result["length"] == length]
        farthest = [result for result in every if result["depth"] == 0]
        for place, results in {f"in {length} tokens": every, f"from the start of {length}": farthest}.items():
            for name in ("accuracy", "gain"):
                found[f"{place}: {name}"] = fmean(result[name] for result in results)
    return found


def compared_scores(row: dict[str, Any]) -> dict[str, float]:
    """What pairs are set against each other in: tasks that these models are above chance in, and recall."""
    tasks = {task: score["metrics"] for task, score in row["tasks"].items()}
    found = {f"{task} acc": tasks[task]["acc"]["value"] for task in ("lambada", "blimp", "arc_easy") if task in tasks}
    if "wikitext-2" in tasks:
        found["wikitext-2 loss a token"] = math.log(tasks["wikitext-2"]["token_perplexity"]["value"])
    return found | {f"recall {head}": value for head, value in recall_scores(row).items() if head.startswith("in ")}


def course(row: dict[str, Any]) -> dict[str, float]:
    """Held-out loss on the way, by step; earlier runs did not record it."""
    return {f"{int(step):,}": loss for step, loss in row.get("course", {}).items()}


def layouts_of(arms: Sequence[Arm]) -> list[Arm]:
    """Layouts of the same cache, what they are compared with, and smaller heads of that cache."""
    names = {
        name for question, pairs in QUESTIONS.items() if "same cache" in question for pair in pairs for name in pair
    }
    return [arm for arm in arms if arm.design in names | {"H64-MQA"}]


def render(arms: Sequence[Arm], rows: Sequence[dict[str, Any]]) -> str:
    """The part of docs/study.md that is made from the results."""
    if not arms:
        return "No runs yet."
    by_name = {arm.design: arm for arm in arms}
    pairs = [
        Pair(question, by_name[design], by_name[reference])
        for question, named in QUESTIONS.items()
        for design, reference in named
        if design in by_name and reference in by_name and by_name[design].rows.keys() & by_name[reference].rows.keys()
    ]
    parts = [_summary(rows), _main_table(arms), _noise(arms, pairs)]
    parts += [f"![Held-out loss against KV bytes per token](images/{PLOT.name})", _pairs_table(pairs)]
    if layouts_of(arms):
        parts.append(f"![Layouts of the same cache: held-out loss and recall](images/{LAYOUTS_PLOT.name})")
    if any(row["tasks"] for arm in arms for row in arm.rows.values()):
        parts.append(_tasks_table(arms))
    parts += [_recall_table(arms), _scored_pairs_table(pairs), _course_table(pairs), _course_of_seeds(arms)]
    parts.append(_rates_table(arms))
    return "\n\n".join(filter(None, parts))


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    finished = [row for row in rows if "validation" in row]
    tokens = sum(row["tokens"] for row in finished)
    # Runs that shared a GPU have each waited for the other; the first had none to share with, and did not say so.
    minutes = sum((row["seconds"] + row["evaluation_seconds"]) / row.get("runs_on_gpu", 1) for row in finished) / 60
    machines = sorted({row["environment"]["gpu"] or row["environment"]["processor"] for row in finished})
    dates = sorted(row["environment"]["time"][:10] for row in finished)
    diverged = len(rows) - len(finished)
    return (
        f"{len(finished)} runs, {tokens / 1e9:.2f} billion tokens of the {CORPUS}, {minutes:.0f} GPU minutes of "
        f"training and evaluation on {', '.join(machines)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
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
        rows.append([*cells, f"{fmean(row['validation']['bits_per_byte'] for row in arm.rows.values()):.4f}"])
    heads = ["design", "KV bytes per token", "parameters", "rate", "seeds", "held-out loss: mean (range)"]
    return _table([*heads, "s.e. over documents", "perplexity", "bits per byte"], rows)


def _noise(arms: Sequence[Arm], pairs: Sequence[Pair]) -> str:
    text = describe_noise({arm.design: arm.loss for arm in arms}, [pair.loss for pair in pairs])
    if len({len(arm.rows) for arm in arms}) == 1:
        return text
    return f"{text} Not all designs have the same seeds: means are over a design's own, differences over common ones."


def _pairs_table(pairs: Sequence[Pair]) -> str:
    rows = []
    for pair in pairs:
        more = round((pair.design.first["parameters"] - pair.reference.first["parameters"]) / 1e6, 2)
        parameters = f"{more:+.2f} M".replace("-", "−") if more else "as many"
        rows.append([*pair.cells(), parameters, *_loss_cells(pair.loss)])
        if later := pair.later_loss:
            rows.append([pair.question, "", "by the seeds added later alone", "", *_loss_cells(later)])
    heads = [*PAIR_HEADS, "parameters", "difference of loss ± 95%", "seeds", "verdict"]
    return _table(heads, _without_repeats(rows))


def _loss_cells(found: Difference) -> list[str]:
    return [format_difference(found), str(len(found.seeds)), "one seed" if found.half_width is None else found.verdict]


def _scored_pairs_table(pairs: Sequence[Pair]) -> str:
    """Differences in tasks and recall of the pairs that have two seeds."""
    scored = [pair for pair in pairs if len(pair.loss.seeds) > 1]
    if not scored:
        return ""
    heads = _heads([pair.design for pair in scored], compared_scores)
    rows, count = [], 0
    for pair in scored:
        cells = pair.cells()
        for head in heads:
            found = pair.score(head, compared_scores)
            count += found is not None and found.half_width is not None
            text = NONE if found is None else format_difference(found)
            cells.append(f"**{text}**" if found is not None and found.resolved else text)
        rows.append(cells)
    return _table([*PAIR_HEADS, *heads], _without_repeats(rows)) + (
        "\n\nDifferences ± 95%, paired by seed as those of the loss are. Bold: the interval leaves out zero, as of "
        f"{count} comparisons of equals about {round(count * (1 - CONFIDENCE))} would. Recall: over five distances."
    )


def _course_table(pairs: Sequence[Pair]) -> str:
    """Differences on the way, of pairs that went at the same rate."""
    pairs = [pair for pair in pairs if pair.design.rate == pair.reference.rate]
    heads = _heads([pair.design for pair in pairs], course)
    rows = []
    for pair in pairs:
        found = [pair.score(head, course) for head in heads]
        if any(found):
            rows.append([*pair.cells(), *(NONE if each is None else format_difference(each) for each in found)])
    if not rows:
        return ""
    heads = [*PAIR_HEADS, *(f"after step {head}" for head in heads)]
    return _table(heads, _without_repeats(rows)) + (
        "\n\nDifferences of held-out loss on the way ± 95%, over the seeds whose course was recorded. All but the last "
        "are of part of the held-out text."
    )


def _course_of_seeds(arms: Sequence[Arm]) -> str:
    """Whether a seed that ends ahead of its design's others was ahead of them before."""
    *heads, last = _heads(arms, course) or [""]
    several = [arm for arm in arms if len(arm.scores(last, course)) > 1]
    if not several:
        return ""
    found = []
    for head in heads:
        before, after = (
            [value for arm in several for value in _from_mean(arm.scores(when, course))] for when in (head, last)
        )
        found.append(f"{correlation(before, after):.2f} after step {head}")
    runs = sum(len(arm.scores(last, course)) for arm in several)
    return (
        "How far the loss of a run is from the mean of its design correlates with how far it is at the end by "
        f"{', '.join(found)} ({runs} runs of {len(several)} designs)."
    )


def _from_mean(values: Mapping[int, float]) -> list[float]:
    mean = fmean(values.values())
    return [value - mean for value in values.values()]


def _tasks_table(arms: Sequence[Arm]) -> str:
    first = arms[0].first
    errors = {head: metric["standard_error"] for head, metric in _metrics(first).items()}
    heads, rows = _scores_table(arms, task_scores)
    name = f"s.e. over items, of `{arms[0].design}` with seed {first['seed']}"
    rows.append([name, *(NONE if (e := errors.get(head)) is None else f"±{_figure(e)}" for head in heads)])
    return _table(["design", *heads], rows) + (
        "\n\nMean and range over seeds. The last row says how far a score may be from that of all such items; the "
        "items are the same for every design, so it is no measure of their differences."
    )


def _recall_table(arms: Sequence[Arm]) -> str:
    heads, rows = _scores_table(arms, recall_scores)
    return _table(["recall", *heads], rows) + (
        "\n\nMean and range over seeds, of means over five distances; from the start: the farthest by itself. Accuracy "
        f"of guessing: {arms[0].first['recall'][0]['chance']:.4f}. Gain in nats a word."
    )


def _scores_table(arms: Sequence[Arm], scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row for each design: mean and range over its seeds."""
    heads = _heads(arms, scores)
    rows = []
    for arm in arms:
        cells = [f"`{arm.design}`"]
        for head in heads:
            found = arm.scores(head, scores)
            cells.append(_mean_and_range(Spread.of(list(found.values()))) if len(found) == len(arm.rows) else NONE)
        rows.append(cells)
    return heads, rows


def _heads(arms: Sequence[Arm], scores: Scores) -> list[str]:
    return list(dict.fromkeys(head for arm in arms for row in arm.rows.values() for head in scores(row)))


def _mean_and_range(spread: Spread) -> str:
    return _figure(spread.mean) + ("" if spread.std is None else f" ({_figure(spread.low)}–{_figure(spread.high)})")


def _figure(value: float) -> str:
    """Three digits after the point, of a perplexity fewer."""
    return f"{value:,.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def _rates_table(arms: Sequence[Arm]) -> str:
    rates = sorted({rate for arm in arms for rate in arm.tried})
    rows = [
        [f"`{arm.design}`", *(f"{arm.tried[rate]:.4f}" if rate in arm.tried else "" for rate in rates)] for arm in arms
    ]
    return _table(["held-out loss of the first seed at rate", *(f"{rate:g}" for rate in rates)], rows)


def _without_repeats(rows: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    """A first cell that says what the one above it does is left empty."""
    above = None
    for first, *rest in rows:
        yield ["" if first == above else first, *rest]
        above = first


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
    if layouts := layouts_of(arms):
        gains = [Spread.of([*arm.scores("in 1024 tokens: gain", recall_scores).values()]) for arm in layouts]
        LAYOUTS_PLOT.write_bytes(
            to_png(draw_layouts([(arm.design, arm.loss, gain) for arm, gain in zip(layouts, gains, strict=True)]))
        )
    print(f"{len(arms)} designs from {len(rows)} runs: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
