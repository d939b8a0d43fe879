"""The figure that `crosslayer plan --plot` draws: cache bytes per token, and cache memory against context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosslayer.plan.config import ModelConfig
from crosslayer.plan.cost import kv_bytes, kv_bytes_per_token
from crosslayer.plan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_costs(
    designs: Sequence[tuple[str, ModelConfig]], *, context: int, batch: int, memory: int, cache_dtype: str
) -> Figure:
    """Left, the KV bytes of a token in each design, with a hollow dot for the same model unshared; right, the KV bytes
    of `batch` sequences against their length, to past `context`, with a line at `memory` bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    few, many = matplotlib.colormaps["tab10"], matplotlib.colormaps["turbo"]
    count = len(designs)
    colours = [few(i) if count <= 10 else many(0.05 + 0.9 * i / (count - 1)) for i in range(count)]
    figure = Figure(figsize=(12, max(4.2, 1.4 + 0.3 * count)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _per_token(left, designs, colours, cache_dtype)
    _against_context(right, designs, colours, context, batch, memory, cache_dtype)
    return figure


def _per_token(axes: Axes, designs: Sequence[tuple[str, ModelConfig]], colours: Sequence[object], dtype: str) -> None:
    for row, ((_, config), colour) in enumerate(zip(designs, colours, strict=True)):
        shared = kv_bytes_per_token(config, dtype)
        unshared = kv_bytes_per_token(config.with_plan(config.plan.unshared), dtype)
        axes.plot([shared, unshared], [row, row], color=colour, linewidth=2, alpha=0.4, zorder=1)
        axes.scatter(unshared, row, s=46, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=2)
        axes.scatter(shared, row, s=46, color=colour, zorder=3)
        label = axes.annotate(format_bytes(shared), (shared, row), (-9, 0), textcoords="offset points", fontsize=9)
        label.set(ha="right", va="center")
    axes.set_yticks(range(len(designs)), [name for name, _ in designs])
    axes.set_ylim(len(designs) - 0.4, -0.6)
    _bytes_axis(axes, "x")
    low, high = axes.dataLim.intervalx
    axes.set_xlim(low / 6, high * 2)  # room for the labels on the left
    axes.set_title(f"KV cache per token, {dtype} (hollow: unshared)", fontsize=11, loc="left")


def _against_context(
    axes: Axes,
    designs: Sequence[tuple[str, ModelConfig]],
    colours: Sequence[object],
    context: int,
    batch: int,
    memory: int,
    dtype: str,
) -> None:
    last = max(17, (8 * context).bit_length())
    lengths = [round(2 ** (power / 4)) for power in range(4 * 8, 4 * last + 1)]
    for (name, config), colour in zip(designs, colours, strict=True):
        axes.plot(lengths, [kv_bytes(config, n, batch, dtype) for n in lengths], color=colour, label=name)
    axes.axhline(memory, color="0.35", linestyle="--", linewidth=1)
    axes.annotate(format_bytes(memory), (lengths[0], memory), (2, 4), textcoords="offset points", fontsize=9)
    axes.set_xscale("log", base=2)
    powers = range(8, last + 1, 2 if last < 22 else 4)
    axes.set_xticks([2**p for p in powers], [f"{2 ** (p % 10)}{' KMG'[p // 10].strip()}" for p in powers])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")
    _bytes_axis(axes, "y")
    axes.set_title(f"KV cache of {batch} sequence{'s' * (batch > 1)}, {dtype}", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bytes_axis(axes: Axes, which: str) -> None:
    from matplotlib.ticker import LogLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    axis.set_major_locator(LogLocator(base=4))
    axis.set_major_formatter(lambda value, _: format_bytes(round(value)))
    axes.grid(axis="both" if which == "y" else "x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
