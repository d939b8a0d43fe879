"""Sharing plans, model shapes, and the arithmetic that follows from them. Imports no torch."""

from crosslayer.plan.config import ModelConfig, RopeScaling
from crosslayer.plan.designs import DESIGNS, parse_plan
from crosslayer.plan.sharing import SharingPlan, Slot

__all__ = ["DESIGNS", "ModelConfig", "RopeScaling", "SharingPlan", "Slot", "parse_plan"]
