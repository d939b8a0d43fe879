"""The table that `crosslayer compare` prints, and the same cells and sentences for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import fill

from crosslayer.compare.results import Continuation, DesignResult, Results
from crosslayer.compare.statistics import UNRESOLVED, Difference, Spread
from crosslayer.train.metrics import clock

NONE = "–"
LEFT_ALIGNED = ("design", "verdict")


def header(results: Results) -> list[tuple[str, str]]:
    """The heads of the columns, two lines each."""
    return [
        ("", "design"),
        ("KV bytes", "per token"),
        ("as", "allocated"),
        ("", "parameters"),
        ("held-out loss:", "mean (range)"),
        ("", "perplexity"),
        ("bits", "per byte"),
        ("difference to", results.designs[0].design),
        ("", "verdict"),
        ("", "time"),
    ]


def row(results: Results, design: DesignResult) -> list[str]:
    """The cells of one design, in the order of `header`."""
    shape, summary = design.shape, design.summary
    costs = [NONE] * 3
    if shape is not None:
        costs = [format_bytes_per_token(shape.kv_bytes_per_token)]
        costs += [format_bytes_per_token(shape.allocated_kv_bytes_per_token), f"{shape.parameters / 1e6:,.2f} M"]
    if summary is None:
        return [design.design, *costs, "failed", *[NONE] * 5]
    difference, verdict = "", ""
    if design is not results.designs[0]:
        found = results.to_first(design.design)
        difference, verdict = (
            (NONE, "no seed in common") if found is None else (format_difference(found), found.verdict)
        )
    return [
        design.design,
        *costs,
        format_spread(summary.loss),
        f"{summary.perplexity.mean:.2f}",
        f"{summary.bits_per_byte.mean:.4f}",
        difference,
        verdict,
        clock(summary.seconds.mean),
    ]


def format_table(results: Results) -> str:
    """The table, and below it what the figures are, how far they carry, and what failed."""
    heads = header(results)
    rows = [[top for top, _ in heads], [name for _, name in heads]]
    rows += [row(results, design) for design in results.designs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        aligned = [
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for (_, name), cell, width in zip(heads, cells, widths, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    width = sum(widths) + 2 * len(widths) - 2
    lines.insert(2, "-" * width)
    noise = describe_noise(results.losses, results.differences)
    notes = [describe_figures(results), noise, *describe_failures(results)]
    return "\n".join([*lines, "", *(fill(note, width) for note in notes)])


def describe_figures(results: Results) -> str:
    """What the columns hold."""
    return (
        f"{budget(results)}. KV bytes: of a {results.cache_dtype} cache of {results.context:,} tokens. "
        "Difference: mean ± 95% interval, paired by seed. Time: training, mean of a run."
    )


def budget(results: Results) -> str:
    """Tokens and seeds, in words."""
    seeds = len(results.config.seeds)
    return f"{results.tokens:,} tokens a run, {seeds} seed{'s' * (seeds > 1)} a design"


def describe_failures(results: Results) -> list[str]:
    """Which runs failed and why, an item for the seeds of a design that failed alike."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for run in results.failures:
        seeds.setdefault((run.design, str(run.error)), []).append(str(run.seed))
    return [
        f"Failed: {design}, seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {error}"
        for (design, error), numbers in seeds.items()
    ]


def describe_sample(results: Results, sample: Continuation) -> str:
    """Who wrote the continuation, and with how much cache."""
    first = results.designs[0].design
    text = f"{sample.tokens} tokens by {sample.design} (seed {sample.seed}), with a {sample.cache_dtype} cache of "
    text += f"{sample.cache_bytes:,} bytes"
    if sample.reference_cache_bytes is not None and sample.design != first:
        text += f"; {first} would take {sample.reference_cache_bytes:,}"
    return text + "."


def describe_noise(losses: Mapping[str, Spread], differences: Iterable[Difference]) -> str:
    """How much of a difference is noise: from the least to the most, since what is pooled over designs as unlike as
    these may be is true of none of them."""
    stds = {design: loss.std for design, loss in losses.items() if loss.std is not None}
    if not stds:
        return f"Seed noise cannot be told from one seed, so every difference is {UNRESOLVED}."
    text = f"Seed noise: over seeds, the loss of a design has a standard deviation of {_range(stds)}."
    halves = {f"{d.design} against {d.reference}": d.half_width for d in differences if d.half_width is not None}
    if halves:
        text += f" A difference shows where it is larger than the ± of its own interval, {_range(halves)}."
    return text


def _range(figures: Mapping[str, float]) -> str:
    """The lowest and the highest, and whose they are."""
    ordered = [f"{figure:.4f} ({name})" for name, figure in sorted(figures.items(), key=lambda item: item[1])]
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def format_bytes_per_token(count: int | float) -> str:
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def format_spread(spread: Spread) -> str:
    return f"{spread.mean:.4f}" + ("" if spread.std is None else f" ({spread.low:.3f}–{spread.high:.3f})")


def format_difference(difference: Difference) -> str:
    """The mean and, where there is one, half the width of its interval."""
    mean = f"{difference.mean:+.4f}".replace("-", "−")
    return mean + ("" if difference.half_width is None else f" ±{difference.half_width:.4f}")
