"""Pipeline stages that no shared keys or values would have to cross.

Nothing here runs a pipeline; other software does, and a cut inside a group of layers that share would leave its readers
without what they read.
"""

from __future__ import annotations

from itertools import pairwise

from crosslayer.errors import UserError
from crosslayer.plan.sharing import SharingPlan


def check_cut(plan: SharingPlan, cut: int) -> None:
    """Whether a stage may end before layer `cut`.

    Raises:
        UserError: there is no layer on one of its sides, or a layer on one side reads a layer on the other; the message
            names both.
    """
    if not 0 < cut < plan.num_layers:
        raise UserError(f"a pipeline cut must lie between 1 and {plan.num_layers - 1}, got {cut}")
    for kind, sources in (("keys", plan.key_sources), ("values", plan.value_sources)):
        for layer, source in enumerate(sources):
            if (layer < cut) != (source < cut):
                raise UserError(f"a pipeline cut before layer {cut}: layer {layer} reads the {kind} of layer {source}")


def pipeline_stages(plan: SharingPlan, stages: int) -> tuple[range, ...]:
    """The layers of each of `stages` stages, as even as the plan's groups allow (least sum of squared sizes).

    Raises:
        UserError: the plan has too few places to cut; the message gives one that is none, and why.
    """
    if not 1 <= stages <= plan.num_layers:
        raise UserError(f"pipeline stages must number from 1 to the {plan.num_layers} layers, got {stages}")
    cuts = plan.pipeline_cuts
    if stages - 1 > len(cuts):
        legal = ", ".join(map(str, cuts)) or "none"
        try:
            check_cut(plan, next(cut for cut in range(1, plan.num_layers) if cut not in cuts))
        except UserError as reason:
            raise UserError(f"{stages} pipeline stages need {stages - 1} cuts; legal are: {legal} ({reason})") from None
    # For each end of a number of stages: the least cost, and the bounds that have it.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for _ in range(stages):
        best = {
            end: min(
                (cost + (end - start) ** 2, (*bounds, end)) for start, (cost, bounds) in best.items() if start < end
            )
            for end in (*cuts, plan.num_layers)
            if end > min(best)
        }
    bounds = best[plan.num_layers][1]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))
