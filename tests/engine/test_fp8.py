"""The 8-bit cache: what is stored lies within a bound of what was meant, and attention is that of what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crosslayer.model import ContiguousCache, Transformer
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import SlotScales
from tests.conftest import tiny_config
from tests.engine.rows import Rows
from tests.model.checks import assert_close, difference, random_model, random_tokens

PLANS = ("cla2", "fusedkv-lite", "yoco:window=5", "0,1,1,1,4,1/0,1,0,3,3,0")
LENGTH = 24


def make_rows(model: Transformer) -> Rows:
    return Rows(model, 1, 4, LENGTH, dtype=FP8, scales=slot_scales(model))


def one_by_one(rows: Rows, tokens: Tensor) -> Tensor:
    """Logits of each token of [1, T], fed one at a time."""
    return torch.cat([rows.feed(tokens, [1], [True]) for _ in tokens[0]])


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 300.0])
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_what_is_stored_is_near_what_was_meant(plan: str, magnitude: float) -> None:
    """Within 1/16 of each value or 1/1000 of the largest, whatever the slot's magnitude, with room above; and the
    logits are those without a cache to within a tenth of the largest."""
    model = random_model(tiny_config(plan))
    for name, parameter in model.named_parameters():
        if "v_proj" in name:
            parameter.mul_(magnitude)
        elif "o_proj" in name:
            parameter.div_(magnitude)
    tokens = random_tokens(model, 1, LENGTH)
    exact = ContiguousCache(model.config, 1, LENGTH)
    for position in range(LENGTH):
        model(tokens[:, position : position + 1], cache=exact)
    rows = make_rows(model)
    logits = one_by_one(rows, tokens)
    cache = rows.cache
    table = rows.sequences[0].tables[cache.spans[0]]
    # The lowest layer's keys and values do not depend on what is read from the cache.
    for pools, scales, buffers in (
        (cache.keys, cache.scales.keys, exact.keys),
        (cache.values, cache.scales.values, exact.values),
    ):
        stored = pools[0][table.blocks].flatten(0, 1).float() * scales[0]
        meant = buffers[0][0].transpose(0, 1)
        newest = range(LENGTH - len(meant), LENGTH)
        for position in newest:
            error = (stored[position - 4 * table.first] - meant[position % len(meant)]).abs()
            assert (error <= meant[position % len(meant)].abs() / 16 + meant.abs().max() / 1000).all()
        assert 448 / 32 < (stored.abs().max() / scales[0]) < 448 / 4
    expected = model(tokens)[0]
    assert 1e-4 < difference(logits, expected) < 0.1


@torch.no_grad()
def test_scales_come_in_where_they_belong() -> None:
    """A cache in float32 with scales gives what one without gives: powers of two lose nothing."""
    model = random_model(tiny_config("fusedkv-lite"))
    tokens = random_tokens(model, 1, LENGTH)
    plan = model.config.plan
    scales = SlotScales(
        {owner: 2.0 ** (owner - 2) for owner in plan.key_slots},
        {owner: 2.0 ** (3 - owner) for owner in plan.value_slots},
    )
    rows = Rows(model, 1, 4, LENGTH, scales=scales)
    assert_close(one_by_one(rows, tokens), model(tokens)[0], "scaled")


@torch.no_grad()
def test_what_is_too_large_is_clipped() -> None:
    model = random_model(tiny_config("cla2"))
    scales = slot_scales(model)
    for parameter in (model.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.v_proj.weight):
        parameter.mul_(1000)
    rows = Rows(model, 1, 4, LENGTH, dtype=FP8, scales=scales)
    assert one_by_one(rows, random_tokens(model, 1, LENGTH)).isfinite().all()
    for pool in (rows.cache.keys[0], rows.cache.values[0]):
        tables = rows.sequences[0].tables[rows.cache.spans[0]]
        assert pool[tables.blocks].float().abs().max() == 448
