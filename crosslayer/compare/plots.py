"""The plots of a comparison: loss against KV bytes, and loss against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from crosslayer.compare.results import Curve, DesignResult, Results
from crosslayer.compare.statistics import Spread
from crosslayer.compare.table import format_bytes_per_token, format_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Okabe and Ito's colours, told apart with any colour vision; their yellow is left out, being too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
# Where a label may go: offset from its point (in points of 1/72 inch) and alignment, the best place first.
PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    *(
        (dx, dy, ha, "center")
        for dy in (24, -24, 48, -48, 72, -72, 96, -96)
        for dx, ha in ((12, "left"), (-12, "right"))
    ),
)
NEAR = 4  # as many of them are beside the point
SMOOTHING = 0.04  # of the run, on either side


def draw_pareto(results: Results) -> Figure:
    """Held-out loss against KV bytes per token: for each design the mean over seeds, their range, and every seed."""
    figure, (axes,) = make_figure(7.2, 4.2, 1)
    xs = move_apart([shape.allocated_kv_bytes_per_token for _, shape, _ in results.finished])
    labels = []
    for x, (design, _, summary) in zip(xs, results.finished, strict=True):
        style = _style(results, design)
        loss, colour = summary.loss, style["color"]
        axes.vlines(x, loss.low, loss.high, color=colour, linewidth=3, alpha=0.3)
        axes.plot([x] * len(design.losses), list(design.losses.values()), "_", color=colour, markersize=9)
        axes.plot(x, loss.mean, markersize=8, **style)
        text = design.design
        if (difference := results.to_first(text)) is not None:
            text += f"\n{format_difference(difference)}" + ("" if difference.resolved else "\nnot resolved")
        labels.append((x, loss, text, colour))
    bytes_axis(axes, sorted({shape.allocated_kv_bytes_per_token for _, shape, _ in results.finished}))
    axes.margins(y=0.2)
    axes.set_xlabel(f"KV cache, bytes per token ({results.cache_dtype})")
    axes.set_ylabel("held-out loss, nats per token")
    first = results.designs[0].design
    axes.set_title(f"mean, range and each seed; numbers: difference to {first}", fontsize=10, loc="left")
    place_labels(figure, axes, labels)
    return figure


def draw_curves(results: Results) -> Figure:
    """Left, training loss (smoothed lines) and held-out loss (points), means over seeds; right, how far the held-out
    loss is from the first design's at the same seed, mean and range."""
    figure, (left, right) = make_figure(9.6, 3.8, 2)
    first = {run.seed: run.curve for run in results.designs[0].runs}
    tops, bottoms = [], []
    for design, _, _ in results.finished:
        curves = {run.seed: run.curve for run in design.runs if run.curve is not None}
        style = _style(results, design)
        training = _mean([curve.loss for curve in curves.values()])
        held_out = _mean([curve.validation_loss for curve in curves.values()])
        tokens, at = next((curve.tokens, curve.validation_tokens) for curve in curves.values())
        left.plot(tokens, _smooth(training), color=style["color"], linewidth=1.3)
        left.plot(at, held_out, markersize=4, linestyle="none", label=design.design, **style)
        tops.append(_smooth(training)[len(training) // 10])
        bottoms.append(min(*training, *held_out))
        pairs = [(curve, base) for seed, curve in curves.items() if (base := first[seed]) is not None]
        if pairs:
            gaps = [_gap(curve, base) for curve, base in pairs]
            low, high = ([pick(column) for column in zip(*gaps, strict=True)] for pick in (min, max))
            right.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
            right.plot(at, _mean(gaps), markersize=4, linewidth=1.3, **style)
    left.set_ylim(min(bottoms) - 0.05 * (max(tops) - min(bottoms)), max(tops))  # the first steps' fall is left out
    left.legend(frameon=False, fontsize=9)
    left.set_title("loss: training (lines), held-out (points)", fontsize=10, loc="left")
    right.set_title(f"held-out loss minus that of {results.designs[0].design}", fontsize=10, loc="left")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel("nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    return figure


def make_figure(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches, and its panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def to_png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _style(results: Results, design: DesignResult) -> dict[str, Any]:
    """A design has the same colour and marker in every plot."""
    number = results.designs.index(design)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def move_apart(values: Sequence[float]) -> list[float]:
    """Equal values moved a little apart, so that what stands there can be told apart."""
    places = []
    for number, value in enumerate(values):
        before, all_equal = values[:number].count(value), values.count(value)
        places.append(value * 1.05 ** (before - (all_equal - 1) / 2))
    return places


def bytes_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with room for labels on both sides, and a tick at each value that has room for its own."""
    room = (values[-1] / values[0]) ** 0.35 * 1.2
    left, right = values[0] / room, values[-1] * room
    ticks: list[float] = []
    for value in values:
        if not ticks or value / ticks[-1] > (right / left) ** 0.06:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [format_bytes_per_token(tick) for tick in ticks])
    axes.minorticks_off()


def place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[float, Spread, str, str]]) -> None:
    """Write each label (x, loss, text, colour) by its mean, in the first place where it covers nothing and the line to
    it, if it takes one, passes by no other point."""
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout, so that boxes can be measured
    figure.set_layout_engine("none")
    bars = [Bbox(axes.transData.transform([(x, loss.low), (x, loss.high)])) for x, loss, _, _ in labels]
    taken = [bar.padded(12) for bar in bars]  # pixels: what is this near to a point seems to be its label

    def cost(box: Bbox, passed: int) -> float:
        covered = sum(_overlap(box, other) for other in taken)
        return covered + (1 + passed) * box.width * box.height - _overlap(box, axes.bbox)

    for number, (x, loss, text, colour) in enumerate(labels):
        places = [
            axes.annotate(
                text,
                (x, loss.mean),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=colour,
                fontsize=9,
                linespacing=1.3,
            )
            for dx, dy, ha, va in PLACES
        ]
        (px, py), pixels = axes.transData.transform((x, loss.mean)), figure.dpi / 72
        ends = [(px + dx * pixels, py + dy * pixels) for dx, dy, _, _ in PLACES]
        others = [bar.padded(4) for bar in (*bars[:number], *bars[number + 1 :])]  # pixels: the radius of a point
        passed = [sum(Path([(px, py), end]).intersects_bbox(other) for other in others) for end in ends]
        passed[:NEAR] = [0] * NEAR  # they take no line
        costs = [cost(place.get_window_extent(), count) for place, count in zip(places, passed, strict=True)]
        best = costs.index(min(costs))
        taken.append(places[best].get_window_extent())
        for place in places[:best] + places[best + 1 :]:
            place.remove()
        if best >= NEAR:  # a line tells whose it is
            end = axes.transData.inverted().transform(ends[best])
            axes.plot([x, end[0]], [loss.mean, end[1]], color=colour, linewidth=0.6, scalex=False, scaley=False)


def _overlap(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _mean(series: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*series, strict=True)]


def _gap(curve: Curve, base: Curve) -> list[float]:
    return [a - b for a, b in zip(curve.validation_loss, base.validation_loss, strict=True)]


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over SMOOTHING of the run on either side."""
    reach = round(SMOOTHING * len(values))
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _short(count: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"
