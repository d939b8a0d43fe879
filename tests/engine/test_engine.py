"""Greedy output is that of the model without a cache, whatever the engine does to get there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslayer.engine import blocks
from crosslayer.model import Transformer
from crosslayer.model.paged import slots_of_spans
from tests.conftest import CACHEABLE
from tests.engine.runs import (
    MAX_LENGTH,
    assert_greedy,
    assert_nothing_held,
    check_accounts,
    collect,
    model_of,
    request,
    run,
    small_engine,
)

PROMPTS = ([3, 14, 15, 9, 2, 6], [5], [35, 8, 9, 7, 9, 32, 38, 46, 2, 6, 4, 33, 8], [27, 1, 8], list(range(40)))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("plan", CACHEABLE)
def test_every_design(plan: str, overlaps: bool) -> None:
    model = model_of(plan)
    engine = small_engine(model, 2.2, overlaps=overlaps, max_step_tokens=11)
    requests = [request(number, prompt, 20) for number, prompt in enumerate(PROMPTS)]
    tokens = run(engine, requests, arrivals=[0, 0, 3, 4, 4])
    for number, prompt in enumerate(PROMPTS):
        assert len(tokens[str(number), 0]) == 20
        assert_greedy(model, prompt, tokens[str(number), 0])
    assert_nothing_held(engine)
    assert len({tuple(row[:5]) for row in tokens.values()}) > 1


@st.composite
def workloads(draw: st.DrawFn) -> dict[str, object]:
    """Prompts, many of which begin alike, with when they come and how long they go on; and how the engine is set."""
    beginnings = draw(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=30), min_size=1, max_size=2))
    prompts = [
        (draw(st.sampled_from(beginnings)) + draw(st.lists(st.integers(0, 60), max_size=12)))[
            : draw(st.integers(1, 42))
        ]
        for _ in range(draw(st.integers(1, 6)))
    ]
    return {
        "prompts": prompts,
        "arrivals": [draw(st.integers(0, 12)) for _ in prompts],
        "max_tokens": [draw(st.integers(1, MAX_LENGTH - len(prompt))) for prompt in prompts],
        "samples": [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in prompts],
        "sequences": draw(st.sampled_from([1.0, 1.3, 2.0, 5.0])),
        "overlaps": draw(st.booleans()),
        "config": {
            "block_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
            "max_step_tokens": draw(st.sampled_from([1, 3, 7, 16, 64, 1000])),
            "max_running": draw(st.sampled_from([1, 2, 3, 100])),
            "prefix_caching": draw(st.booleans()),
        },
    }


def serve(model: Transformer, work: dict) -> None:
    engine = small_engine(model, work["sequences"], overlaps=work["overlaps"], **work["config"])
    requests = [
        request(number, prompt, tokens, n=n)
        for number, (prompt, tokens, n) in enumerate(
            zip(work["prompts"], work["max_tokens"], work["samples"], strict=True)
        )
    ]
    results = run(engine, requests, work["arrivals"])
    for (name, _), tokens in results.items():
        assert len(tokens) == work["max_tokens"][int(name)]
        assert_greedy(model, work["prompts"][int(name)], tokens)
    assert_nothing_held(engine)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plan=st.sampled_from(CACHEABLE), work=workloads())
def test_any_workload(plan: str, work: dict) -> None:
    serve(model_of(plan), work)


@pytest.mark.slow
@settings(max_examples=180, deadline=None, derandomize=True)
@given(plan=st.sampled_from(CACHEABLE), work=workloads())
def test_many_workloads(plan: str, work: dict) -> None:
    serve(model_of(plan), work)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("plan", ["cla2", "yoco:window=5"])
def test_preemption_happens_and_changes_nothing(plan: str, overlaps: bool) -> None:
    model = model_of(plan)
    engine = small_engine(model, 1.2, overlaps=overlaps)
    tokens = run(engine, [request(number, prompt, 24) for number, prompt in enumerate(PROMPTS)])
    assert engine.scheduler.num_preemptions > 0
    for number, prompt in enumerate(PROMPTS):
        assert_greedy(model, prompt, tokens[str(number), 0])


@pytest.mark.parametrize("overlaps", [False, True])
def test_first_come_first_served(overlaps: bool) -> None:
    """Whoever comes first is done first, even where those who came later must give way to it."""
    engine = small_engine(model_of("cla2"), 1.2, overlaps=overlaps)
    for number in range(6):
        engine.add(request(number, range(number, number + 20), 30))
    ended = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == list("012345")
    assert engine.scheduler.num_preemptions > 0


def test_hardly_anybody_is_let_in_only_to_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full cache and others waiting, as under load. If no blocks were kept free, 44 of these had to."""

    def preemptions() -> int:
        engine = small_engine(model_of("cla2"), 8)
        chance = random.Random(0)
        run(engine, [request(n, [n % 61] * chance.randrange(10, 25), chance.randrange(10, 25)) for n in range(150)])
        return engine.scheduler.num_preemptions

    assert preemptions() < 20
    monkeypatch.setattr(blocks, "SPREAD", 0.0)
    assert preemptions() > 40


def test_prompts_and_next_tokens_share_steps_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(model_of("cla2"), 8, max_step_tokens=10)
    engine.add(request("short", [1, 2, 3], 20))
    engine.step()
    engine.add(request("long", range(40), 20))
    seen = []
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda step: (seen.append(sum(i.new for i in step)), launch(step))[1])
    for _ in range(5):
        assert "short" in [output.request_id for output in engine.step()]
    # One token of the short one beside nine of the long one's prompt, until that is through.
    assert seen == [10, 10, 10, 10, 5]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("plan", ["cla2", "yoco:window=5", "0@5,1@5,2@5,3@5,4@5,5@5"])
def test_a_prompt_that_begins_alike_is_not_computed_again(plan: str, overlaps: bool) -> None:
    model = model_of(plan)
    engine = small_engine(model, 4, overlaps=overlaps)
    prompt = list(range(30))
    first = run(engine, [request("a", prompt, 10)])["a", 0]
    assert engine.scheduler.num_prefix_tokens == 0
    for continued, expected in (
        (prompt, 28),
        ([*prompt, *first, 9], 36),
        ([*prompt[:10], 59, 60], 8),
        ([60, *prompt], 0),
    ):
        before = engine.scheduler.num_prefix_tokens
        tokens = run(engine, [request("b", continued, 5)])["b", 0]
        assert_greedy(model, continued, tokens)
        assert engine.scheduler.num_prefix_tokens - before == expected
    assert_nothing_held(engine)


def test_prefixes_whose_window_is_gone_are_computed_again() -> None:
    """The old blocks of a window may be in use for something else while those of the whole context are still there."""
    model = model_of("yoco:window=5")
    engine = small_engine(model, 1.5)
    prompt = list(range(40))
    run(engine, [request("a", prompt, 1)])
    windows = [pool for span, pool in engine.blocks.pools.items() if span < MAX_LENGTH]
    for pool in windows:
        blocks = [pool.take() for _ in range(pool.num_free)]
        for block in blocks:
            pool.release(block)
    tokens = run(engine, [request("b", prompt, 5)])["b", 0]
    assert engine.scheduler.num_prefix_tokens == 0
    assert_greedy(model, prompt, tokens)


@pytest.mark.parametrize("plan", ["cla2", "yoco:window=5"])
def test_samples_of_a_prompt_share_its_blocks(plan: str) -> None:
    model = model_of(plan)
    engine = small_engine(model, 6)
    engine.add(request("a", range(33), 8, n=4, temperature=1.0, seed=1))
    outputs = engine.step()
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert engine.scheduler.num_prefix_tokens == 3 * 32
    for span, pool in engine.blocks.pools.items():
        full = 8 if span == MAX_LENGTH else 2  # blocks of 4 tokens; the window of the next token starts in block 7
        assert len(pool.references) - pool.num_free == full - (span < MAX_LENGTH) + 4
    while engine.has_work:
        engine.step()
    assert_nothing_held(engine)


@pytest.mark.parametrize("overlaps", [False, True])
def test_windows_bound_what_a_long_sequence_holds(overlaps: bool) -> None:
    """With windows only, a sequence many times longer than the cache goes through it."""
    model = model_of("0@5,1@5,2@5,3@5,4@5,5@5", max_position_embeddings=400)
    engine = small_engine(model, 1.0, max_length=400, overlaps=overlaps)
    (pool,) = engine.blocks.pools.values()
    assert len(pool.references) * 4 < 20
    tokens = run(engine, [request("a", range(50), 200)])["a", 0]
    assert_greedy(model, range(50), tokens)


def test_a_window_of_one_token() -> None:
    """Its block is gone as soon as it is full, before the block would get a name."""
    model = model_of("0,1@1,2@1,3,3,3")
    engine = small_engine(model, 3)
    for name, prompt in (("a", range(10)), ("b", range(15))):
        engine.add(request(name, prompt, 20))
        tokens = {(name, 0): list[int]()}
        while engine.has_work:
            collect(engine.step(), tokens)
            check_accounts(engine)
        assert_greedy(model, prompt, tokens[name, 0])
    assert engine.scheduler.num_prefix_tokens == 8


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("plan", "blocks"), [("cla2", {64: 5}), ("yoco:window=5", {64: 5, 5: 3})])
def test_the_most_bytes_used_are_those_of_the_blocks_held(plan: str, blocks: dict[int, int], overlaps: bool) -> None:
    """10 tokens and 8 more, of which the last is never put in: 17 tokens in blocks of 4. A window of 5 takes two
    blocks, but the first pass needs those of the whole prompt, three."""
    model = model_of(plan)
    engine = small_engine(model, 4, overlaps=overlaps)
    run(engine, [request("a", range(10), 8)])
    slots = slots_of_spans(model.config, MAX_LENGTH)
    assert engine.most_cache_bytes_used == sum(slots[span] * count for span, count in blocks.items()) * 4 * 2 * 10 * 4
    assert engine.cache_bytes_used == 0


def test_what_is_there_now_and_what_was_found() -> None:
    model = model_of("cla2")
    engine = small_engine(model, 4)
    engine.add(request("a", range(10), 8))
    (output,) = engine.step()
    assert (output.num_prefix, engine.request_ids) == (0, {"a"})
    a_block = 4 * 2 * 10 * 4 * 2 * 3  # tokens, KV heads, head_dim, float32; keys and values, three owners
    assert engine.cache_bytes_used == 3 * a_block
    engine.add(request("b", [*range(9), 5, 6], 8))
    assert engine.request_ids == {"a", "b"}
    found = {output.request_id: output.num_prefix for output in engine.step()}
    assert found == {"a": 0, "b": 8}  # two whole blocks of nine tokens
    assert engine.cache_bytes_used == 4 * a_block
    for name in "ab":
        engine.abort(name)
    assert not engine.request_ids
    assert engine.cache_bytes_used == 0


def test_a_preempted_sequence_does_not_count_what_it_finds_of_its_own() -> None:
    engine = small_engine(model_of("cla2"), 1.1, max_length=64)
    for number in range(3):
        engine.add(request(number, [number * 7 + place for place in range(6)], 40))
    found = [output.num_prefix for _ in range(300) for output in engine.step()]
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_prefix_tokens > 0
    assert set(found) == {0}


def test_cla2_holds_twice_the_tokens() -> None:
    tokens = {}
    for plan in ("identity", "cla2"):
        model = model_of(plan)
        engine = small_engine(model, 1, cache_bytes=10**6, block_size=16)
        assert engine.runner.cache.nbytes <= 10**6
        tokens[plan] = engine.cache_tokens
    assert tokens["cla2"] == pytest.approx(2 * tokens["identity"], abs=16)
