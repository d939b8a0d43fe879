"""What sharing buys, as a table, and as a plot of throughput against the pool and time to first token against load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crosslayer.compare.plots import COLOURS
from crosslayer.plan.units import format_bytes

# A design, a cache dtype, a pool and a mix, and what was measured of them; see `benchmarks.what_sharing_buys`.
Point = dict[str, Any]


def table(points: Sequence[Point]) -> str:
    """The points as Markdown."""
    heads = ["requests", "pool", "design", "cache", "running", "begun, ended per second", "tokens/s"]
    heads.append("time to first token at each rate, median")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|---|---:|---:|---:|---|"]
    for point in sorted(points, key=lambda point: (point["mix"], point["pool"])):
        loads = ", ".join(
            f"{'over ' * bool(load['waiting'])}{load['ttft_ms']['p50'] / 1000:.2f} s at {load['rate']:.1f}/s"
            for load in point["load"]
            if load["ttft_ms"]
        )
        dtype = point["cache_dtype"].replace("auto", "bf16")
        row = [point["mix"], format_bytes(point["pool"]), point["design"], dtype, f"{point['running']:.0f}"]
        row.append(f"{point['begun_per_second']:.1f}, {point['ended_per_second']:.1f}")
        lines.append(f"| {' | '.join(row)} | {point['tokens_per_second']:,.0f} | {loads} |")
    return "\n".join(lines)


def draw(points: Sequence[Point]) -> Figure:
    """A row of two panels for each kind of requests. Colours are designs; what is hatched or dashed has an fp8 cache.

    What was not measured is left out, and a rate that cannot last is marked. Dots are medians, with a line up to the
    90% quantile; a hollow one is a lower bound, because somebody still waited when the time was over.
    """
    mixes = list(dict.fromkeys(point["mix"] for point in points))
    figure = Figure(figsize=(11, 3.6 * len(mixes)), layout="constrained")
    panels = figure.subplots(len(mixes), 2, squeeze=False)
    colours = dict(zip(dict.fromkeys(point["design"] for point in points), COLOURS, strict=False))
    variants = list(dict.fromkeys((point["design"], point["cache_dtype"]) for point in points))
    pools = sorted({point["pool"] for point in points})
    for mix, (left, right) in zip(mixes, panels, strict=True):
        for number, (design, dtype) in enumerate(variants):
            own = [p for p in points if (p["mix"], p["design"], p["cache_dtype"]) == (mix, design, dtype)]
            colour, eight_bits = colours[design], dtype == "fp8"
            style = {"color": colour, "edgecolor": "white", "hatch": "//" if eight_bits else ""}
            style["label"] = f"{design}, {dtype.replace('auto', 'bf16')}"
            _draw_rates(left, own, pools, number, len(variants), style)
            for point in own:
                _draw_waits(right, point["load"], {"color": colour, "linestyle": "--" if eight_bits else "-"})
        left.set_xticks(range(len(pools)), [format_bytes(pool) for pool in pools])
        marked = any(_empties(point) for point in points if point["mix"] == mix)
        left.set_xlabel(f"memory for keys and values (numbers: sequences running{'; *: cannot last' * marked})")
        left.set_ylabel("tokens per second")
        left.set_title(f"{mix}: throughput", fontsize=10, loc="left")
        left.set_xlim(-0.6, len(pools) - 0.4)
        left.margins(y=0.15)
        right.set_xlabel("requests per second")
        right.set_ylabel("seconds, median and up to 90%")
        right.set_ylim(bottom=0)
        loaded = {p["pool"] for p in points if p["mix"] == mix and p["load"]}
        told = "".join(f", {format_bytes(pool)}" for pool in loaded)
        right.set_title(f"{mix}: time to first token{told}", fontsize=10, loc="left")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def _draw_rates(
    axes: Axes, points: Sequence[Point], pools: Sequence[int], number: int, count: int, style: dict[str, Any]
) -> None:
    """Bars of one of `count` variants, with how many sequences ran above."""
    width = min(0.3, 0.8 / count)
    left = [pools.index(point["pool"]) + (number - (count - 1) / 2) * width for point in points]
    bars = axes.bar(left, [point["tokens_per_second"] for point in points], 0.92 * width, **style)
    labels = [f"{point['running']:.0f}{'*' * _empties(point)}" for point in points]
    axes.bar_label(bars, labels, padding=2, fontsize=8)


def _empties(point: Point) -> bool:
    """Whether many more requests ended than began, so that the pool would soon be empty."""
    return bool(point["ended_per_second"] > 1.5 * point["begun_per_second"])


def _draw_waits(axes: Axes, loads: Sequence[Point], style: dict[str, Any]) -> None:
    there = [load for load in loads if load["ttft_ms"]]
    rates, waits = [load["rate"] for load in there], [load["ttft_ms"]["p50"] / 1000 for load in there]
    axes.plot(rates, waits, **style)
    for rate, wait, load in zip(rates, waits, there, strict=True):
        axes.vlines(rate, wait, load["ttft_ms"]["p90"] / 1000, color=style["color"], linewidth=1, alpha=0.6)
        face = "white" if load["waiting"] else style["color"]
        axes.plot(rate, wait, "o", markersize=5, markeredgecolor=style["color"], markerfacecolor=face)
