"""The paged cache against runs without a cache: any plan, any chunks, blocks wherever they happen to be free."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crosslayer.errors import UserError
from crosslayer.model import Transformer
from crosslayer.model.paged import BlockTable, PagedCache, PagedRow, divide_memory, slots_of_spans
from crosslayer.plan import PRESETS, parse_design
from crosslayer.plan.cost import kv_bytes_per_token
from tests.conftest import BUILDABLE, tiny_config
from tests.model.checks import assert_close, random_model, random_tokens
from tests.model.test_random_plans import backward_plans, servable

NUM_BLOCKS = 60


class Rows:
    """Sequences in a paged cache, with a naive allocator that frees what no window reaches and reuses it at once."""

    def __init__(self, model: Transformer, count: int, block_size: int, max_length: int) -> None:
        self.model = model
        self.spans = slots_of_spans(model.config, max_length)
        self.cache = PagedCache(model.config, dict.fromkeys(self.spans, NUM_BLOCKS), block_size, max_length)
        for pool in (*self.cache.keys.values(), *self.cache.values.values()):
            pool.fill_(100.0)  # what other sequences left behind
        self.tables = [{span: BlockTable() for span in self.spans} for _ in range(count)]
        self.done = [0] * count
        self.free = {span: list(range(NUM_BLOCKS)) for span in self.spans}
        self.random = random.Random(0)

    def feed(self, tokens: Tensor, new: list[int], wanted: list[bool]) -> Tensor:
        """Logits of the last new token of each wanted row that has any."""
        size, rows, ids = self.cache.block_size, [], []
        for row, count in enumerate(new):
            if not count:
                continue
            start = self.done[row]
            for span, table in self.tables[row].items():
                first = max(0, start - span + 1) // size if span < self.cache.max_length else 0
                while table.blocks and table.first < first:
                    self.free[span].append(table.blocks.pop(0))
                    table.first += 1
                while table.end * size < start + count:
                    place = self.random.randrange(len(self.free[span]))
                    table.blocks.append(self.free[span].pop(place))
            rows.append(PagedRow(start, count, self.tables[row], wanted[row]))
            ids += tokens[row, start : start + count].tolist()
            self.done[row] += count
        step = self.cache.begin(rows)
        return self.model.lm_head(self.model.model(torch.tensor([ids]), step=step))[0]


@torch.no_grad()
def compare(model: Transformer, schedule: list[list[int]], block_size: int) -> None:
    totals = torch.tensor(schedule).sum(dim=0).tolist()
    tokens = random_tokens(model, len(totals), max(totals))
    expected = model(tokens)
    rows = Rows(model, len(totals), block_size, max(totals))
    for number, new in enumerate(schedule):
        # In some steps all rows ask for logits, in some a few or none do.
        wanted = [number % 3 == 0 or (row + number) % 2 == 0 for row in range(len(totals))]
        logits = rows.feed(tokens, new, wanted)
        asked = [row for row, count in enumerate(new) if count and wanted[row]]
        if all(count <= 1 for count in new) and len(asked) == sum(new):
            asked = [row for row, count in enumerate(new) if count]
        assert len(logits) == len(asked)
        for row, actual in zip(asked, logits, strict=True):
            assert_close(actual, expected[row, rows.done[row] - 1], f"step {number}, row {row}")


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("plan", BUILDABLE)
def test_ragged_chunks_equal_uncached_runs(plan: str, block_size: int) -> None:
    schedule = [[5, 1, 9], [3, 8, 0], [1, 1, 1], [0, 2, 4], [1, 1, 1], [1, 1, 1], [6, 7, 2]]
    compare(random_model(tiny_config(plan)), schedule, block_size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans_and_schedules(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3), label="rows")
    news = st.lists(st.integers(0, 7), min_size=rows, max_size=rows).filter(any)
    schedule = data.draw(st.lists(news, min_size=1, max_size=5), label="new tokens per step and row")
    max_length = max(torch.tensor(schedule).sum(dim=0).tolist())
    plan = servable(data.draw(backward_plans(), label="plan"), max_length)
    compare(random_model(tiny_config(plan)), schedule, data.draw(st.sampled_from([1, 2, 5]), label="block size"))


@pytest.mark.parametrize("plan", ["yoco:window=5", "cla2", "suffix:3", "identity"])
@torch.no_grad()
def test_layers_above_the_cut_run_for_wanted_tokens_only(plan: str) -> None:
    model = random_model(tiny_config(plan))
    cut = model.config.plan.prefill_cut
    assert cut == {"yoco:window=5": 4, "cla2": 5, "suffix:3": 3, "identity": 6}[plan]
    tokens, seen = random_tokens(model, 3, 12), {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, inputs, number=number: seen.update({number: inputs[0].shape[1]}))
    rows = Rows(model, 3, 4, 12)
    for new, wanted, expected in (
        ([7, 5, 9], [False, True, True], 2),
        ([1, 7, 1], [False, False, False], 0),
        ([1, 0, 1], [True, True, True], 2),
    ):
        assert len(rows.feed(tokens, new, wanted)) == expected
        assert list(seen.values()) == [sum(new)] * cut + [expected] * (6 - cut if expected else 0)
        seen.clear()


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


@pytest.mark.parametrize("plan", BUILDABLE)
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
