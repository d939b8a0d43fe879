"""The study's plots: held-out loss against KV bytes per token, ours next to the paper's; and layouts of one cache."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study import ROOT
from crosslayer.compare.plots import COLOURS, bytes_axis, make_figure, move_apart, place_labels
from crosslayer.compare.statistics import Spread

# KV bytes per token, loss, design.
Point = tuple[int | float, Spread, str]


def _table_1() -> dict[str, tuple[int, float]]:
    """The paper's table 1 (arXiv 2405.12981): KV bytes per token and validation perplexity at 1B, 30B tokens, one seed,
    by design."""
    with (ROOT / "configs" / "paper" / "runs.tsv").open(encoding="utf-8") as file:
        runs = [run for run in csv.DictReader(file, delimiter="\t") if run["run"] == f"1b-{run['design']}"]
    return {run["design"]: (int(run["kv_bytes_per_token"]), float(run["perplexity"])) for run in runs}


PAPER = _table_1()

KINDS = dict(zip(("no sharing", "CLA2", "other sharing"), COLOURS, strict=False))


def draw(points: Sequence[Point], title: str) -> Figure:
    """Losses in nats per token, with their range over seeds; a line joins the best points of each kind of sharing. The
    paper's are natural logarithms of its perplexities, and have no range: it reports one run each. Of ours, those of
    the paper's kinds: controls and later layouts would hide them."""
    figure, (left, right) = make_figure(14, 6, 2)
    points = [point for point in points if is_of_the_paper(point[2])]
    _draw_panel(figure, left, points, title)
    paper: list[Point] = [(count, Spread.of([math.log(ppl)]), design) for design, (count, ppl) in PAPER.items()]
    _draw_panel(figure, right, paper, "arXiv 2405.12981, table 1: 1B parameters, 30B tokens, one run each")
    return figure


def draw_layouts(layouts: Sequence[tuple[str, Spread, Spread]]) -> Figure:
    """Designs of one size of cache, by name, loss and gain in recall, both with their range over seeds: the lowest loss
    on top."""
    figure, panels = make_figure(11, 0.8 + 0.32 * len(layouts), 2)
    designs, *figures = zip(*sorted(layouts, key=lambda layout: -layout[1].mean), strict=True)
    heads = ("held-out loss, nats per token", "gain in recall, nats per word")
    for axes, head, spreads in zip(panels, heads, figures, strict=True):
        for y, (design, spread) in enumerate(zip(designs, spreads, strict=True)):
            colour = KINDS[kind_of(design)]
            axes.hlines(y, spread.low, spread.high, color=colour, linewidth=1.5)
            axes.plot(spread.mean, y, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(designs)), designs)
        axes.set_title(head, fontsize=10, loc="left")
    panels[1].tick_params(labelleft=False)
    return figure


def _draw_panel(figure: Figure, axes: Axes, points: Sequence[Point], title: str) -> None:
    points = sorted(points, key=lambda point: point[0])
    xs = move_apart([count for count, _, _ in points])
    for kind, colour in KINDS.items():
        own = [(x, loss) for x, (_, loss, design) in zip(xs, points, strict=True) if kind_of(design) == kind]
        best = [(x, loss.mean) for i, (x, loss) in enumerate(own) if all(loss.mean < o.mean for _, o in own[:i])]
        axes.plot([x for x, _ in best], [mean for _, mean in best], color=colour, linewidth=1, alpha=0.5)
        axes.vlines([x for x, _ in own], [o.low for _, o in own], [o.high for _, o in own], color=colour, linewidth=1.5)
        axes.plot([x for x, _ in own], [o.mean for _, o in own], "o", color=colour, markersize=5, label=kind)
    bytes_axis(axes, sorted({count for count, _, _ in points}))
    axes.margins(y=0.15)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("KV cache, bytes per token (bf16)")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)
    labels = [(x, loss, design, KINDS[kind_of(design)]) for x, (_, loss, design) in zip(xs, points, strict=True)]
    place_labels(figure, axes, labels)


def is_of_the_paper(design: str) -> bool:
    """Whether the paper has such a design, at any head size."""
    *_, plan = design.split("-")
    return plan in ("KeepEnds", "DenseFront", "DenseBack") or plan.startswith(("CLA", "MHA", "GQA", "MQA"))


def kind_of(design: str) -> str:
    """The kind of sharing (a key of KINDS) of one of the study's designs."""
    plan = design.removesuffix("-wide").split("-")[-1]
    if plan == "CLA2":
        return plan
    return "no sharing" if plan in ("MHA", "MQA") or plan.startswith("GQA") else "other sharing"
