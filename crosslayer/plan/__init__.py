"""Sharing plans, model shapes, and the arithmetic that follows from them. Imports no torch."""

from crosslayer.plan import notations
from crosslayer.plan.config import ModelConfig, RopeScaling
from crosslayer.plan.cost import Cost
from crosslayer.plan.designs import DESIGNS, parse_plan
from crosslayer.plan.presets import PRESETS, parse_design, preset
from crosslayer.plan.sharing import SharingPlan, Slot

__all__ = [
    "DESIGNS",
    "PRESETS",
    "Cost",
    "ModelConfig",
    "RopeScaling",
    "SharingPlan",
    "Slot",
    "notations",
    "parse_design",
    "parse_plan",
    "preset",
]
