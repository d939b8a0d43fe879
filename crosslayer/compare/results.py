"""What a comparison found, as data: all that the table, the plots and the report are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crosslayer.compare.config import CompareConfig
from crosslayer.compare.statistics import Difference, Spread
from crosslayer.plan import SharingPlan


@dataclass(frozen=True)
class Curve:
    """Losses by tokens trained on: of the batches (means between two log lines), and of the held-out text."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]
    validation_tokens: tuple[int, ...]
    validation_loss: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training run, in `folder` of the output folder: its held-out scores, seconds of training and curve, or the
    error that ended it."""

    design: str
    seed: int
    folder: str
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    seconds: float | None = None
    curve: Curve | None = None
    error: str | None = None


@dataclass(frozen=True)
class Shape:
    """A design applied to the comparison's model shape. The KV bytes are those of one token in a full context: as the
    planner computes them, and as a cache that was really allocated takes."""

    kv_bytes_per_token: int | float
    allocated_kv_bytes_per_token: int | float
    num_kv_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    parameters: int
    sharing_plan: dict[str, Any]

    @property
    def plan(self) -> SharingPlan:
        return SharingPlan.from_dict(self.sharing_plan)


@dataclass(frozen=True)
class Summary:
    """Scores of a design over the seeds that finished."""

    seeds: tuple[int, ...]
    loss: Spread
    perplexity: Spread
    bits_per_byte: Spread
    seconds: Spread

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Summary | None:
        finished = [run for run in runs if run.error is None]
        if not finished:
            return None

        def spread(name: str) -> Spread:
            return Spread.of([getattr(run, name) for run in finished])

        seeds = tuple(run.seed for run in finished)
        return cls(seeds, spread("loss"), spread("perplexity"), spread("bits_per_byte"), spread("seconds"))


@dataclass(frozen=True)
class DesignResult:
    """A design: its shape (None where it has none, being no design), its summary (None where no run finished) and its
    runs, in the order of the seeds."""

    design: str
    learning_rate: float
    shape: Shape | None
    summary: Summary | None
    runs: tuple[Run, ...]

    @property
    def losses(self) -> dict[int, float]:
        """Final held-out loss by seed, of the runs that finished."""
        return {run.seed: run.loss for run in self.runs if run.loss is not None}


@dataclass(frozen=True)
class Continuation:
    """Text that one of the trained models wrote, and the bytes of a cache of the prompt and the text; next to them the
    bytes that the first design would have needed (None where it has no shape)."""

    design: str
    seed: int
    prompt: str
    text: str
    tokens: int
    cache_dtype: str
    cache_bytes: int
    reference_cache_bytes: int | None


@dataclass(frozen=True)
class Results:
    """Everything: results.json is this, field by field.

    `context` and `cache_dtype` are those of the KV bytes per token. `differences` holds every pair of designs that
    have a seed in common, the later design against the earlier.
    """

    command: str
    config: CompareConfig
    environment: dict[str, Any]
    data: str
    data_fingerprint: str
    tokens: int
    context: int
    cache_dtype: str
    differences: tuple[Difference, ...]
    sample: Continuation | None
    designs: tuple[DesignResult, ...]

    @property
    def finished(self) -> list[tuple[DesignResult, Shape, Summary]]:
        """The designs with at least one finished run, with their shape and summary."""
        return [(d, d.shape, d.summary) for d in self.designs if d.shape is not None and d.summary is not None]

    @property
    def losses(self) -> dict[str, Spread]:
        """Final held-out losses of the designs with at least one finished run."""
        return {design.design: summary.loss for design, _, summary in self.finished}

    @property
    def failures(self) -> list[Run]:
        return [run for design in self.designs for run in design.runs if run.error is not None]

    def difference(self, design: str, reference: str) -> Difference | None:
        """The difference of two designs, if it is known; `reference` comes earlier in the list of designs."""
        found = (d for d in self.differences if (d.design, d.reference) == (design, reference))
        return next(found, None)

    def to_first(self, design: str) -> Difference | None:
        """The difference to the comparison's first design."""
        return self.difference(design, self.designs[0].design)


def compare_losses(designs: Sequence[DesignResult]) -> tuple[Difference, ...]:
    """All pairwise differences."""
    pairs = [(later, earlier) for i, earlier in enumerate(designs) for later in designs[i + 1 :]]
    found = (Difference.between(a.design, a.losses, b.design, b.losses) for a, b in pairs)
    return tuple(difference for difference in found if difference is not None)
