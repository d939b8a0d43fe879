"""Results of comparisons that never ran."""

from __future__ import annotations

from collections.abc import Mapping

from crosslayer.compare import CompareConfig, Results
from crosslayer.compare.results import Curve, DesignResult, Run, Shape, Summary, compare_losses
from crosslayer.plan import parse_plan


def made_up(designs: Mapping[str, tuple[int, list[float]]]) -> Results:
    """Results with these KV bytes per token and final losses by seed."""
    shown = []
    for name, (num_bytes, losses) in designs.items():
        runs = []
        for seed, loss in enumerate(losses):
            curve = Curve((100, 200, 300, 400), (6.0, 5.0, 4.0, loss), (200, 400), (loss + 1, loss))
            runs.append(Run(name, seed, "", loss, 2.0**loss, loss / 3, 65.0, curve))
        shape = Shape(num_bytes, num_bytes, 4, 4, 1, 32, 1_234_567, parse_plan("cla2", 4).to_dict())
        shown.append(DesignResult(name, 1e-3, shape, Summary.of(runs), tuple(runs)))
    model = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CompareConfig(model, tuple(designs), tuple(range(max(len(losses) for _, losses in designs.values()))))
    return Results("", config, {}, "", "", 400, 16, "bf16", compare_losses(shown), None, tuple(shown))
