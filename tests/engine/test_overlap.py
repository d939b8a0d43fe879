"""A step is launched before the tokens of the one before it are known: what must not come of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from crosslayer.data import Tokenizer
from crosslayer.engine import LLM, Completion, Engine, EngineConfig, SamplingParams
from crosslayer.engine.sampler import Draws
from crosslayer.engine.scheduler import Scheduled
from tests.conftest import tiny_config
from tests.engine.runs import (
    assert_greedy,
    assert_nothing_held,
    check_accounts,
    collect,
    model_of,
    request,
    run,
    small_engine,
)
from tests.model.checks import random_model

PLANS = ("cla2", "yoco:window=5", "fusedkv-lite")
TOKENIZER = Tokenizer.train(["three cats sat on seven mats and ate some rats " * 20], 280)


class Fault(Exception):
    pass


@contextmanager
def before_launch(engine: Engine, act: Callable[[list[Scheduled]], None]) -> Iterator[None]:
    """Something happens, or is looked at, whenever a step is launched."""
    launch = engine.runner.launch

    def act_and_launch(step: list[Scheduled]) -> Draws:
        act(step)
        return launch(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "launch", act_and_launch)
        yield


def finish(engine: Engine, tokens: dict[tuple[str, int], list[int]]) -> None:
    while engine.has_work:
        collect(engine.step(), tokens)
        check_accounts(engine)


def test_steps_are_launched_ahead_and_never_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine(model_of("cla2"), overlaps=True)
    events: list[str] = []
    result = Draws.result

    def collecting(draws: Draws) -> object:
        events.append("collect")
        return result(draws)

    monkeypatch.setattr(Draws, "result", collecting)
    engine.add(request("a", range(5), 4))
    with before_launch(engine, lambda step: events.append("launch")):
        counts = []
        while engine.has_work:
            counts.append(len(engine.step()))
    assert events == ["launch", *["launch", "collect"] * 3, "collect"]
    assert counts == [0, 1, 1, 1, 1]


def all_kinds() -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=12),
        SamplingParams(temperature=1.0, top_p=0.9, seed=3, n=2, logprobs=2, max_tokens=12),
        SamplingParams(max_tokens=20, min_tokens=5, stop_token_ids=tuple(range(0, 280, 9))),
        SamplingParams(max_tokens=20, temperature=1.5, seed=1, stop_token_ids=tuple(range(0, 280, 5))),
        SamplingParams(max_tokens=20, temperature=1.5, seed=1, min_tokens=3, stop=("a", "e", "c", "r", " ")),
    ]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("penalised", [False, True])
def test_both_orders_give_the_same(plan: str, penalised: bool) -> None:
    """Seeds, counts of tokens, stop tokens and strings, log-probabilities; with penalties nobody's tokens may wait."""
    model = random_model(tiny_config(plan, vocab_size=TOKENIZER.vocab_size))
    params = all_kinds()
    if penalised:
        params.insert(1, SamplingParams(max_tokens=7, temperature=0.5, seed=2, repetition_penalty=1.5))
        params.append(SamplingParams(max_tokens=15, frequency_penalty=0.7, presence_penalty=0.1))
    prompts = [TOKENIZER.encode(f"{number} cats on mats") for number in range(len(params))]
    pending: list[int] = []  # at steps that draw with penalties

    def look(step: list[Scheduled]) -> None:
        if any(item.sequence.request.params.has_penalties and item.sequence.num_output for item in step):
            pending.extend(item.sequence.num_pending for item in step)

    given: list[list[list[Completion]]] = []
    for overlaps in (False, True):
        config = EngineConfig(block_size=4, max_length=64, cache_bytes=10**6, max_running=4)
        llm = LLM(model, config, tokenizer=TOKENIZER)
        llm.engine.runner.overlaps = overlaps
        with before_launch(llm.engine, look):
            given.append(llm.generate(prompts, params))
        assert_nothing_held(llm.engine)
    reasons = {completion.finish_reason for samples in given[0] for completion in samples}
    assert reasons == {"stop", "length"}
    assert given[0] == given[1]
    assert not any(pending)
    assert bool(pending) == penalised


@pytest.mark.parametrize(("block_size", "found"), [(4, 36), (1, 38)])
def test_a_block_is_found_once_its_tokens_are_known(block_size: int, found: int) -> None:
    """40 tokens, the last of which is never put in. In blocks of one token, the one before it is pending to the end."""
    model, prompt = model_of("cla2"), list(range(30))
    engine = small_engine(model, 4, overlaps=True, block_size=block_size)
    first = run(engine, [request("a", prompt, 10)])["a", 0]
    continued = [*prompt, *first, 9]
    assert_greedy(model, continued, run(engine, [request("b", continued, 5)])["b", 0])
    assert engine.scheduler.num_prefix_tokens == found


@pytest.mark.parametrize("plan", PLANS)
def test_whoever_ends_with_a_token_takes_part_in_one_step_too_many(plan: str) -> None:
    model = model_of(plan)
    free = run(small_engine(model), [request("a", range(6), 12)])["a", 0]
    engine = small_engine(model, overlaps=True)
    engine.add(request("a", range(6), 12, stop_token_ids=(free[7],)))
    engine.add(request("b", range(30, 36), 20))
    tokens: dict[tuple[str, int], list[int]] = {("a", 0): [], ("b", 0): []}
    rows: list[int] = []
    with before_launch(engine, lambda step: rows.append(len(step))):
        while "a" in engine.request_ids:
            collect(engine.step(), tokens)
            check_accounts(engine)
        assert all(len(pool.references) - pool.num_free <= 5 for pool in engine.blocks.pools.values())  # those of b
        finish(engine, tokens)
    until = free.index(free[7])
    assert tokens["a", 0] == free[:until]
    assert rows == [2] * (until + 2) + [1] * (20 - until - 2)
    assert_greedy(model, range(30, 36), tokens["b", 0])
    assert_nothing_held(engine)


@pytest.mark.parametrize("plan", PLANS)
def test_the_token_of_a_preempted_sequence_still_arrives(plan: str) -> None:
    model = model_of(plan)
    engine = small_engine(model, 2.0, overlaps=True)
    waited = []
    prompts = {str(number): range(number, number + 3) for number in range(4)}
    with before_launch(engine, lambda _: waited.append(sum(s.num_pending for s in engine.scheduler.waiting))):
        results = run(engine, [request(name, prompt, 57) for name, prompt in prompts.items()])
    assert any(waited)
    for (name, _), tokens in results.items():
        assert len(tokens) == 57
        assert_greedy(model, prompts[name], tokens)
    assert_nothing_held(engine)


def test_the_token_of_an_aborted_sequence_is_dropped() -> None:
    model = model_of("cla2")
    engine = small_engine(model, overlaps=True)
    engine.add(request("a", range(9), 20))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    check_accounts(engine)
    assert all(pool.num_free == pool.size for pool in engine.blocks.pools.values())
    assert engine.has_work
    assert not engine.request_ids
    assert engine.step() == []
    assert_nothing_held(engine)
    # Its blocks and its slot go to another one before the step in which it took part is collected.
    engine.add(request("a", range(9), 20))
    engine.step()
    engine.abort("a")
    assert_greedy(model, range(20, 50), run(engine, [request("b", range(20, 50), 9)])["b", 0])


def test_a_closed_stream_leaves_nothing_behind() -> None:
    llm = LLM(model_of("cla2"), EngineConfig(block_size=4, max_length=64, cache_bytes=10**6))
    llm.engine.runner.overlaps = True
    stream = llm.stream([[1, 2, 3]], SamplingParams(max_tokens=9))
    next(stream)
    stream.close()
    assert_nothing_held(llm.engine)


@pytest.mark.parametrize("plan", PLANS)
def test_a_launch_that_fails_leaves_the_step_before_it(plan: str) -> None:
    """The one who was preempted when it failed has a token on the way, which its slot on the device lost."""
    model = model_of(plan)
    engine = small_engine(model, 1.5, overlaps=True)
    tokens: dict[tuple[str, int], list[int]] = {}
    for number in range(2):
        tokens[str(number), 0] = []
        engine.add(request(number, range(number, number + 3), 57))

    def fail(step: list[Scheduled]) -> None:
        if any(sequence.num_pending for sequence in engine.scheduler.waiting):
            raise Fault

    with before_launch(engine, fail), pytest.raises(Fault):
        finish(engine, tokens)
    assert engine.request_ids == {"1"}
    check_accounts(engine)
    finish(engine, tokens)
    assert len(tokens["1", 0]) == 57
    assert_greedy(model, range(1, 4), tokens["1", 0])
    assert_nothing_held(engine)


@pytest.mark.parametrize("plan", PLANS)
def test_a_step_that_fails_takes_those_with_it_that_were_launched_since(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have used blocks that it was to fill."""
    model, prompt = model_of(plan), [(7 * place) % 61 for place in range(30)]
    engine = small_engine(model, 8, overlaps=True)
    engine.add(request("a", prompt, 1))
    engine.step()
    engine.add(request("b", prompt))

    def fail(_: Draws) -> None:
        raise Fault

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "result", fail)
        with pytest.raises(Fault):
            engine.step()
    assert engine.scheduler.num_prefix_tokens == 28
    assert_nothing_held(engine)
    for owner in engine.runner.cache.keys:
        torch.nn.init.constant_(engine.runner.cache.keys[owner], 9.0)  # what a failed step may leave
    assert_greedy(model, prompt, run(engine, [request("b", prompt)])["b", 0])
