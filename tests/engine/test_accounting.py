"""Blocks are never lost and never held twice, whatever happens in whatever order: arrivals, aborts, failing steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crosslayer.engine import Engine
from crosslayer.engine.sampler import Draws
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

PLANS = ("cla2", "yoco:window=5", "fusedkv-lite", "0@3,0@7,0@5,3@4,3,3@2", "0@5,1@5,2@5,3@5,4@5,5@5")
PLACES = ("before the model", "in the model", "after the model", "on the way back", "after drawing")


class Fault(Exception):
    pass


@contextmanager
def broken(engine: Engine, place: str) -> Iterator[None]:
    """Steps raise Fault at this place."""

    def fault(*_: object, **__: object) -> None:
        raise Fault

    with pytest.MonkeyPatch.context() as patch:
        if place == "before the model":
            patch.setattr(engine.runner, "launch", fault)
        elif place == "in the model":
            add = engine.runner.model._add
            patch.setattr(engine.runner.model, "_add", lambda n, *rest: fault() if n == 3 else add(n, *rest))
        elif place == "after the model":
            patch.setattr(Draws, "__init__", fault)
        elif place == "on the way back":
            patch.setattr(Draws, "result", fault)
        else:
            patch.setattr(engine, "_advance", fault)
        yield


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plan", PLANS)
def test_what_a_failed_step_did_not_store_is_not_found(plan: str, place: str, overlaps: bool) -> None:
    model, prompt = model_of(plan), [(7 * place) % 61 for place in range(30)]
    engine = small_engine(model, 8, overlaps=overlaps, max_step_tokens=40)
    engine.add(request("a", prompt))
    with broken(engine, place), pytest.raises(Fault):
        run(engine, [])
    assert_nothing_held(engine)
    assert_greedy(model, prompt, run(engine, [request("a", prompt)])["a", 0])


class EngineMachine(RuleBasedStateMachine):
    engine: Engine

    @initialize(
        plan=st.sampled_from(PLANS),
        sequences=st.sampled_from([1.0, 1.4, 3.0]),
        block_size=st.sampled_from([1, 3, 4]),
        budget=st.sampled_from([2, 9, 50]),
        prefix_caching=st.booleans(),
        overlaps=st.booleans(),
    )
    def build(
        self, plan: str, sequences: float, block_size: int, budget: int, prefix_caching: bool, overlaps: bool
    ) -> None:
        self.model = model_of(plan)
        self.engine = small_engine(
            self.model,
            sequences,
            block_size=block_size,
            max_step_tokens=budget,
            max_running=4,
            prefix_caching=prefix_caching,
            overlaps=overlaps,
        )
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}

    @rule(base=st.integers(0, 1), length=st.integers(1, 35), tokens=st.integers(1, 25), n=st.sampled_from([1, 1, 3]))
    def arrive(self, base: int, length: int, tokens: int, n: int) -> None:
        name = str(len(self.prompts))
        self.prompts[name] = [(base + 7 * place) % 61 for place in range(length)]
        self.tokens |= {(name, index): [] for index in range(n)}
        self.engine.add(request(name, self.prompts[name], tokens, n=n))

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine)

    def take(self, engine: Engine) -> None:
        had_work = engine.has_work
        collect(engine.step(), self.tokens)
        assert engine.has_work <= had_work

    @precondition(lambda self: self.engine.request_ids)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine._samples)))
        assert {output.finish_reason for output in self.engine.abort(name)} == {"abort"}
        assert self.engine.abort(name) == []

    @precondition(lambda self: self.engine.request_ids)
    @rule(place=st.sampled_from(PLACES))
    def fail(self, place: str) -> None:
        """A step that breaks drops those who took part."""
        engine, before = self.engine, set(self.engine._samples)
        with broken(engine, place):
            try:
                collect(engine.step(), self.tokens)  # where nobody draws, nothing fails after drawing
            except Fault:
                # A step whose requests were all aborted has nobody to drop.
                assert set(engine._samples) < before or (place == "on the way back" and engine.runner.overlaps)

    @invariant()
    def accounts(self) -> None:
        if hasattr(self, "engine"):
            check_accounts(self.engine)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.take(self.engine)
        assert_nothing_held(self.engine)
        for (name, _), tokens in self.tokens.items():
            if tokens:
                assert_greedy(self.model, self.prompts[name], tokens)


EngineMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None, derandomize=True)
TestAccounting = EngineMachine.TestCase


@pytest.mark.slow
class TestAccountingForLonger(EngineMachine.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=120, stateful_step_count=30, deadline=None, derandomize=True)
