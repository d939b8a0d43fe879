"""report.html: one file that holds a whole comparison, for the browser and for paper. Loads nothing from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from crosslayer.compare.results import Results
from crosslayer.compare.statistics import CONFIDENCE, UNRESOLVED, Difference
from crosslayer.compare.table import (
    LEFT_ALIGNED,
    NONE,
    budget,
    describe_failures,
    describe_figures,
    describe_noise,
    describe_sample,
    format_difference,
    header,
    row,
)
from crosslayer.plan.draw import draw
from crosslayer.settings import to_mapping
from crosslayer.train.metrics import clock

TEMPLATE = Path(__file__).with_name("report.html")


def report_html(results: Results, pareto: bytes, curves: bytes) -> str:
    """The report, with the two plots (PNG) in it."""
    import yaml

    designs = [design.design for design in results.designs]
    heads = ["\n".join(filter(None, head)) for head in header(results)]
    left = [name in LEFT_ALIGNED for _, name in header(results)]
    config = yaml.safe_dump(to_mapping(results.config), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{len(designs)} sharing designs under one budget"),
        subtitle=escape(
            f"crosslayer {results.environment['crosslayer']} · {results.environment['time']} · {budget(results)}"
        ),
        question=(
            f"How much key/value cache does each design save against {escape(designs[0])}, and what does that cost in "
            "held-out loss, when all are trained on the same text in the same order?"
        ),
        answer=_paragraphs(_answer(results)),
        table=_table(heads, [row(results, design) for design in results.designs], left),
        figures=escape(describe_figures(results)),
        failures=_failures(results),
        pareto=_embedded(pareto),
        curves=_embedded(curves),
        noise=_paragraphs([describe_noise(results.losses, results.differences), *_limits(results)]),
        pairs=_pairs(results.differences) if len(designs) > 2 else "",
        plans=_plans(results),
        sample=_sample(results),
        method=_method(results),
        runs=_runs(results),
        command=f"<pre>{escape(results.command)}</pre>" if results.command else "",
        config=escape(config),
        environment=_table(
            ["", ""], [[k, str(v)] for k, v in results.environment.items() if v is not None], [True] * 2
        ),
    )


def _answer(results: Results) -> list[str]:
    """A sentence for each design but the first."""
    reference = results.designs[0]
    sentences = []
    for design in results.designs[1:]:
        difference = results.to_first(design.design)
        if difference is None or design.shape is None or reference.shape is None:
            sentences.append(f"{design.design}: no result to set against {reference.design}.")
            continue
        share = design.shape.allocated_kv_bytes_per_token / reference.shape.allocated_kv_bytes_per_token
        outcome = difference.verdict
        if difference.resolved:
            outcome = f"a {outcome} at this size and with this recipe"
        sentences.append(
            f"{design.design} takes {share:.0%} of the cache of {reference.design}; its held-out loss differs by "
            f"{format_difference(difference)}: {outcome}."
        )
    return sentences


def _limits(results: Results) -> list[str]:
    one = " One seed gives no interval, so nothing is called different." if len(results.config.seeds) == 1 else ""
    return [
        f"A difference counts as resolved only where its {CONFIDENCE:.0%} interval over seeds leaves out zero.{one} "
        "Each interval stands for itself: of twenty comparisons of equals, about one will seem resolved. "
        f"“{UNRESOLVED}” means that the two may be equal or in either order; more seeds or a longer run would tell.",
        "Seeds change the data order and the initial weights and nothing else. Another corpus, model size, number of "
        "tokens or learning rate can change the order of the designs, also where it is resolved here.",
    ]


def _method(results: Results) -> str:
    train, rates = results.config.train, results.config.learning_rates
    own = "".join(f"; {escape(design)}: {rate:g}" for design, rate in rates.items())
    points = [
        f"Data: {escape(results.data)}; fingerprint {escape(results.data_fingerprint)}.",
        f"Training: {train.steps:,} steps of {train.batch_size} sequences of {train.sequence_length:,} tokens, AdamW, "
        f"learning rate {train.learning_rate:g}{own}, {train.warmup_ratio:.0%} warm-up, cosine to "
        f"{train.final_ratio:.0%}.",
        "The same seed gives every design the same batches in the same order, and the same initial values to every "
        "matrix that the designs have in common.",
        "Loss, perplexity and bits per byte are those of the whole held-out text after the last step. Differences are "
        "taken seed by seed, and their interval is Student’s.",
        f"KV bytes are computed from the plan, and measured on a cache allocated for {results.context:,} tokens in "
        f"{escape(results.cache_dtype)}.",
    ]
    return "<ul>" + "".join(f"<li>{point}</li>" for point in points) + "</ul>"


def _failures(results: Results) -> str:
    return "".join(f'<p class="failed">{escape(line)}</p>' for line in describe_failures(results))


def _pairs(differences: Sequence[Difference]) -> str:
    rows = [[d.design, d.reference, format_difference(d), d.verdict] for d in differences]
    heads = ["design", "against", "difference", "verdict"]
    return f'<p>Every pair:</p><div class="wide">{_table(heads, rows, [True, True, False, True])}</div>'


def _plans(results: Results) -> str:
    figures = []
    for design in results.designs:
        if design.shape is not None:
            # A drawing is a sentence, the picture, and perhaps notes, with empty lines between them.
            sentence, picture, *notes = draw(design.shape.plan).split("\n\n")
            told = _paragraphs([f"{sentence}."]), f"<pre>{escape(picture)}</pre>", _paragraphs(notes)
            figures.append(f"<figure><h3>{escape(design.design)}</h3>{''.join(told)}</figure>")
    return "".join(figures)


def _sample(results: Results) -> str:
    sample = results.sample
    if sample is None:
        return ""
    text = f'<pre><span class="given">{escape(sample.prompt)}</span>{escape(sample.text)}</pre>'
    return f"<h2>A continuation</h2><p>{escape(describe_sample(results, sample))} The prompt is grey.</p>{text}"


def _runs(results: Results) -> str:
    rows = []
    for run in (run for design in results.designs for run in design.runs):
        if run.loss is None or run.perplexity is None or run.bits_per_byte is None or run.seconds is None:
            scores = ["failed", NONE, NONE, NONE]
        else:
            scores = [f"{run.loss:.4f}", f"{run.perplexity:.2f}", f"{run.bits_per_byte:.4f}", clock(run.seconds)]
        rows.append([run.design, str(run.seed), *scores, run.folder])
    heads = ["design", "seed", "held-out loss", "perplexity", "bits per byte", "time", "folder"]
    return _table(heads, rows, [True, *[False] * 5, True])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = [' class="text"' if is_left else "" for is_left in left]
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))

    head = f"<thead><tr>{cells('th', heads)}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
