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
    lines = ["| requests | pool | design | cache | running | tokens/s | time to first token at each rate, median |"]
    lines.append("|---|---:|---|---|---:|---:|---|")
    for point in sorted(points, key=lambda point: (point["mix"], point["pool"])):
        loads = ", ".join(
            f"{'over ' * bool(load['waiting'])}{load['ttft_ms']['p50'] / 1000:.2f} s at {load['rate']:.1f}/s"
            for load in point["load"]
            if load["ttft_ms"]
        )
        dtype = point["cache_dtype"].replace("auto", "bf16")
        row = [point["mix"], format_bytes(point["pool"]), point["design"], dtype, f"{point['running']:.0f}"]
        lines.append(f"| {' | '.join(row)} | {point['tokens_per_second']:,.0f} | {loads} |")
    return "\n".join(lines)


def draw(points: Sequence[Point]) -> Figure:
    """A row of two panels for each kind of requests. Colours are designs; dashed lines have an fp8 cache. What was not
    measured is left out; a hollow dot is a lower bound, because somebody still waited when the time was over."""
    mixes = list(dict.fromkeys(point["mix"] for point in points))
    figure = Figure(figsize=(11, 3.6 * len(mixes)), layout="constrained")
    panels = figure.subplots(len(mixes), 2, squeeze=False)
    colours = dict(zip(dict.fromkeys(point["design"] for point in points), COLOURS, strict=False))
    lines = list(dict.fromkeys((point["design"], point["cache_dtype"]) for point in points))
    for mix, (left, right) in zip(mixes, panels, strict=True):
        for design, dtype in lines:
            own = [p for p in points if (p["mix"], p["design"], p["cache_dtype"]) == (mix, design, dtype)]
            label = f"{design}, {dtype.replace('auto', 'bf16')}"
            style = {"color": colours[design], "linestyle": "--" if dtype == "fp8" else "-", "label": label}
            rates = sorted((p["pool"], p["tokens_per_second"]) for p in own)
            left.plot([pool for pool, _ in rates], [rate for _, rate in rates], marker="o", markersize=5, **style)
            _draw_waits(right, [load for p in own for load in p["load"] if load["ttft_ms"]], style)
        _describe(left, sorted({point["pool"] for point in points}), mix)
        right.set_yscale("log")
        right.set_xlabel("requests per second")
        right.set_ylabel("time to first token, s, median")
        loaded = {p["pool"] for p in points if p["mix"] == mix and p["load"]}
        right.set_title("".join(f"{mix}, {format_bytes(pool)} of cache" for pool in loaded), fontsize=10, loc="left")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def _draw_waits(axes: Axes, loads: Sequence[Point], style: dict[str, Any]) -> None:
    rates, waits = [load["rate"] for load in loads], [load["ttft_ms"]["p50"] / 1000 for load in loads]
    axes.plot(rates, waits, **style)
    for rate, wait, load in zip(rates, waits, loads, strict=True):
        face = "white" if load["waiting"] else style["color"]
        axes.plot(rate, wait, "o", markersize=5, markeredgecolor=style["color"], markerfacecolor=face)


def _describe(axes: Axes, pools: Sequence[int], mix: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(pools, [format_bytes(pool) for pool in pools])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("memory for keys and values")
    axes.set_ylabel("tokens per second")
    axes.set_title(mix, fontsize=10, loc="left")
