"""The model laid out for inference, over the paged cache, against the model itself without a cache: any plan, any
chunks, blocks wherever they happen to be free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.engine.batch import UNKNOWN, Shape
from crosslayer.engine.prepared import PreparedModel
from crosslayer.engine.scheduler import Scheduled
from crosslayer.engine.transfer import pack, unpack
from crosslayer.model import Transformer
from tests.conftest import CACHEABLE, tiny_config
from tests.engine.rows import Rows
from tests.model.checks import assert_close, random_model, random_tokens
from tests.model.test_random_plans import backward_plans, servable


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
        assert len(logits) == len(asked)
        for row, actual in zip(asked, logits, strict=True):
            assert_close(actual, expected[row, rows.sequences[row].num_cached - 1], f"step {number}, row {row}")


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("plan", CACHEABLE)
def test_ragged_chunks_equal_uncached_runs(plan: str, block_size: int) -> None:
    schedule = [[5, 1, 9], [3, 8, 0], [1, 1, 1], [0, 2, 4], [1, 1, 1], [1, 1, 1], [6, 7, 2]]
    compare(random_model(tiny_config(plan)), schedule, block_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "attention_output_bias": True},
        {"qk_norm": True},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "qk_norm": True, "separate_kv_norm": False},
    ],
)
def test_variants_of_the_layer(changes: dict[str, bool]) -> None:
    schedule = [[5, 1, 9], [3, 8, 0], [1, 1, 1], [1, 1, 1]]
    compare(random_model(tiny_config("cla2", **changes)), schedule, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_plans_and_schedules(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3), label="rows")
    news = st.lists(st.integers(0, 7), min_size=rows, max_size=rows).filter(any)
    schedule = data.draw(st.lists(news, min_size=1, max_size=5), label="new tokens per step and row")
    max_length = max(torch.tensor(schedule).sum(dim=0).tolist())
    plan = servable(data.draw(backward_plans(), label="plan"), max_length)
    compare(random_model(tiny_config(plan)), schedule, data.draw(st.sampled_from([1, 2, 5]), label="block size"))


ONE_EACH = [([1, 1, 1], [True] * 3), ([1, 0, 1], [True] * 3), ([0, 1, 0], [True] * 3), *[([1, 1, 1], [True] * 3)] * 8]
MIXED = [
    ([5, 1, 3], [False, True, True]),
    ([0, 1, 0], [False] * 3),
    ([1, 1, 1], [True, False, True]),
    ([0, 9, 1], [True, True, False]),  # all the tokens that there are
    ([2, 1, 0], [True] * 3),
]


@pytest.mark.parametrize("plan", ["cla2", "yoco:window=5", "fusedkv-lite", "identity"])
@pytest.mark.parametrize(("shape", "steps"), [(Shape(5, 5), ONE_EACH), (Shape(10, 4), MIXED), (Shape(10, 3), MIXED)])
@torch.no_grad()
def test_what_fills_up_a_shape_changes_nothing(
    plan: str, shape: Shape, steps: list[tuple[list[int], list[bool]]]
) -> None:
    """A step of a fixed shape, as in a CUDA graph: the arrays always have the same shapes, and logits and pools are the
    same."""
    model = random_model(tiny_config(plan))
    tokens = random_tokens(model, 3, 30)
    plain, filled = (Rows(model, 3, 4, 30) for _ in range(2))
    for rows in (plain, filled):
        rows.feed(tokens, [7, 2, 5], [False] * 3)
    described = []
    for new, wanted in steps:
        expected = plain.feed(tokens, new, wanted)
        actual = filled.feed(tokens, new, wanted, shape)
        assert len(actual) == shape.rows
        if len(expected):
            assert_close(actual[: len(expected)], expected, str(new))
        for ours, theirs in zip(filled.cache.keys.values(), plain.cache.keys.values(), strict=True):
            assert_close(ours, theirs, str(new))
        asked = [row for row, (count, draws) in enumerate(zip(new, wanted, strict=True)) if count and draws]
        assert filled.batch.drawing_slots.tolist() == asked + [3] * (shape.rows - len(asked))
        described.append(filled.host.arrays)
    described.append(filled.builder.on_host([], shape).arrays)
    shapes = {tuple((name, array.shape, str(array.dtype)) for name, array in arrays.items()) for arrays in described}
    assert len(shapes) == 1


@pytest.mark.parametrize("plan", ["yoco:window=5", "cla2", "suffix:3", "identity"])
@torch.no_grad()
def test_once_all_is_stored_layers_run_for_wanted_tokens_only(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(plan))
    cut = model.config.plan.prefill_cut
    assert cut == {"yoco:window=5": 4, "cla2": 5, "suffix:3": 3, "identity": 6}[plan]
    tokens, stored, added = random_tokens(model, 3, 12), [], []
    store, add = PreparedModel._store, PreparedModel._add
    monkeypatch.setattr(PreparedModel, "_store", lambda *a: (stored.append(len(a[2])), store(*a))[1])
    monkeypatch.setattr(PreparedModel, "_add", lambda *a: (added.append(len(a[3])), add(*a)))
    rows = Rows(model, 3, 4, 12)
    for new, wanted, expected in (
        ([7, 5, 9], [False, True, True], 2),
        ([1, 7, 1], [False, False, False], 0),
        ([1, 0, 1], [True, True, True], 2),
    ):
        assert len(rows.feed(tokens, new, wanted)) == expected
        assert stored == [sum(new)] * cut + [expected] * (6 - cut if expected else 0)
        assert added == [sum(new)] * (cut - 1) + [expected] * (7 - cut if expected else 0)
        stored.clear()
        added.clear()


def test_a_token_that_is_not_known_yet_is_marked() -> None:
    model = random_model(tiny_config("cla2"))
    rows = Rows(model, 2, 4, 12)
    tokens = random_tokens(model, 2, 12)
    rows.feed(tokens, [3, 5], [True, True])
    first, second = rows.sequences
    second.tokens.append(7)
    first.num_pending = 1
    for sequence in rows.sequences:
        for table in sequence.tables.values():
            table.blocks += [50 + sequence.slot] * ((table.first + len(table.blocks)) * 4 <= sequence.num_cached)
    host = rows.builder.on_host([Scheduled(first, 1, True), Scheduled(second, 1, True)])
    assert host.arrays["ids"].tolist() == [UNKNOWN, 7]
    assert host.arrays["slots"].tolist() == [0, 1]
    assert host.arrays["positions"].tolist() == [3, 5]


def test_one_copy_brings_all_arrays() -> None:
    model = random_model(tiny_config("yoco:window=5"))
    rows = Rows(model, 3, 4, 30)
    rows.feed(random_tokens(model, 3, 30), [7, 0, 5], [True, False, False])
    step = [Scheduled(sequence, 1, False) for sequence in (rows.sequences[0], rows.sequences[2])]
    for sequence in rows.sequences:
        sequence.tokens.append(1)
    arrays = rows.builder.on_host(step).arrays
    for name, tensor in unpack(pack(arrays, pinned=False), arrays).items():
        assert torch.equal(tensor, torch.from_numpy(arrays[name]))
