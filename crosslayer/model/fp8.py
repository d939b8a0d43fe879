"""Keys and values in 8 bits (float8 e4m3fn), with one scale per slot.

A float keeps its relative precision, 1/16 at worst, over a wide range: 448 down to 1/64, and less precisely to 1/1024.
So a scale need only put a slot's values well inside that range, and what a short run over random tokens shows is enough
to choose it by, with room above for larger ones. Beyond the room values are clipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from crosslayer.model.attention import Mask, positional_mask
from crosslayer.model.cache import CacheStep
from crosslayer.model.paged import SlotScales
from crosslayer.model.transformer import Transformer

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# How many times larger than in the trial run a value may be before it is clipped.
HEADROOM = 8
TRIAL_TOKENS = 256


@torch.no_grad()
def slot_scales(model: Transformer) -> SlotScales:
    """Scales by which a model's keys and values fit into 8 bits."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TRIAL_TOKENS), generator=generator)
    trial = _Trial(model, TRIAL_TOKENS)
    model.model(ids.to(trial.positions.device), step=trial)
    return SlotScales(_scales(trial.largest_keys), _scales(trial.largest_values))


def _scales(largest: Mapping[int, float]) -> dict[int, float]:
    return {
        owner: 2.0 ** math.ceil(math.log2(HEADROOM * value / LARGEST)) if value else 1.0
        for owner, value in largest.items()
    }


class _Trial(CacheStep):
    """A pass over the first tokens of one sequence that stores nothing and notes how large keys and values are."""

    def __init__(self, model: Transformer, num_tokens: int) -> None:
        self._plan = model.config.plan
        self.positions = torch.arange(num_tokens, device=model.lm_head.weight.device)[None]
        self.largest_keys: dict[int, float] = {}
        self.largest_values: dict[int, float] = {}

    def store_keys(self, owner: int, fresh: Tensor) -> Tensor:
        self.largest_keys[owner] = fresh.abs().max().item()
        return fresh

    def store_values(self, owner: int, fresh: Tensor) -> Tensor:
        self.largest_values[owner] = fresh.abs().max().item()
        return fresh

    def mask(self, layer: int) -> Mask:
        return positional_mask(self.positions, self.positions, self._plan.windows[layer])
