"""What all tests share: tiny model shapes, and every design that a model can be built from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosslayer.plan import ModelConfig, SharingPlan, parse_plan

LAYERS = 6

# Six layers and short windows, so that every design shares, and every window is shorter than the test sequences.
DESIGNS = (
    "identity",
    "cla2",
    "cla3",
    "cla4",
    "cla4:rest=last",
    "cla2-keepends",
    "cla2-densefront",
    "cla2-denseback",
    "mlkv:2",
    "mixattention:window=5,period=3",
    "suffix:3",
    "suffix:3,window=5,period=2",
    "yoco:window=5",
    "pizza-bottom:3",
    "sandwich-bottom:3",
    "lasagna-bottom:4",
    "fusedkv-lite",
)

# Plans that no name gives: windows without sharing, readers of one slot with different windows, two slots alive at
# once, and keys and values from different layers with and without windows.
EXPLICIT_PLANS = (
    "0@5,1@5,2@5,3@5,4@5,5@5",
    "0@3,0@7,0@5,3@4,3,3@2",
    "0,1,0,1,0,1",
    "0,1,1,1,4,1/0,1,0,3,3,0",
    "0@5,1@5,1@5,1@5,1@5,0@5/0,1,0,3,1,3",
    "0@6,1@6,1@4,0@6,4,4@3/0,1,0,1,4,4",
)

CACHEABLE = (*DESIGNS, *EXPLICIT_PLANS)

# Designs with a layer that reads a layer above itself, whose models know no cache.
LOOPING = ("lckv", "lckv:1", "pizza-middle:3", "sandwich-middle:3", "lasagna-middle:2")


def tiny_config(plan: str | SharingPlan = "cla2", **changes: Any) -> ModelConfig:
    """A model of a few thousand parameters with grouped queries and a query width (40) that is not hidden_size (32)."""
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rope_theta": 100.0,
        **changes,
    }
    if isinstance(plan, str):
        plan = parse_plan(plan, fields["num_hidden_layers"])
    return ModelConfig(**{**fields, "num_hidden_layers": plan.num_layers}, sharing_plan=plan)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models run faster on one thread than on many."""
    torch.set_num_threads(1)
