"""The pools of the paged cache: their bytes are those of the plan, and memory is divided as sequences need it."""

from __future__ import annotations

import pytest
import torch

from crosslayer.errors import UserError
from crosslayer.model.paged import PagedCache, divide_memory, slots_of_spans
from crosslayer.plan import PRESETS, parse_design
from crosslayer.plan.cost import kv_bytes_per_token
from tests.conftest import CACHEABLE, tiny_config


def test_pools_are_the_bytes_of_the_plan() -> None:
    block_size, budget = 16, 2**24
    tokens = {}
    for name in ("H128-MQA", "H128-MQA-CLA2", "H128-MQA-CLA3", "H128-GQA4-CLA2"):
        config = parse_design(name, PRESETS["paper-1b"])
        blocks = divide_memory(config, budget, block_size, 2048, torch.bfloat16)
        cache = PagedCache(config, blocks, block_size, 2048, dtype=torch.bfloat16, device="meta")
        tokens[name] = blocks[2048] * block_size
        assert cache.nbytes == tokens[name] * kv_bytes_per_token(config, "bf16") <= budget
        assert budget - cache.nbytes < block_size * kv_bytes_per_token(config, "bf16")
    assert tokens["H128-MQA-CLA2"] == pytest.approx(2 * tokens["H128-MQA"], abs=block_size)


@pytest.mark.parametrize("plan", CACHEABLE)
def test_allocated_bytes_follow_the_slots(plan: str) -> None:
    config = tiny_config(plan)
    slots = slots_of_spans(config, 40)
    assert sum(slots.values()) == len(config.plan.slots)
    blocks = divide_memory(config, 10**6, 4, 40, torch.float32)
    cache = PagedCache(config, blocks, 4, 40)
    assert cache.nbytes == sum(blocks[span] * slots[span] for span in slots) * 4 * 2 * 10 * 4 <= 10**6
    # Room for as many sequences in each span, to within a block.
    held = {span: -(-span // 4) + (span < 40) for span in slots}
    assert max(blocks[s] // held[s] for s in slots) - min(blocks[s] // held[s] for s in slots) <= 1


def test_misaligned_windows_and_too_little_memory_are_refused() -> None:
    config = tiny_config("0@6,1@4,0@3,3,4,5/0,1,1,3,4,5")
    with pytest.raises(UserError, match=r"layer 2: its keys .* cached for 6 tokens but its values .* for 4"):
        PagedCache(config, {6: 1, 4: 1, 40: 1}, 4, 40)
    with pytest.raises(UserError, match="a cache of 100 bytes is too small: a block of 16 tokens does not fit"):
        divide_memory(tiny_config(), 100, 16, 40, torch.float32)
