"""Deliberate faults in the engine, to show that the tests would notice them."""

from __future__ import annotations

import pytest

from crosslayer.engine import blocks, scheduler
from crosslayer.engine.batch import BatchBuilder
from crosslayer.engine.engine import Engine
from crosslayer.engine.prepared import PreparedModel
from tests.engine.runs import (
    assert_greedy,
    assert_nothing_held,
    check_accounts,
    collect,
    model_of,
    request,
    small_engine,
)
from tests.model.mutations import Mutation

WINDOWS = "yoco:window=5"


def serve(plan: str) -> None:
    """Prompts that begin alike, in chunks, in too little memory, one of them aborted after a chunk; then all again."""
    model = model_of(plan)
    beginning = [(7 * place) % 61 for place in range(22)]
    prompts = [
        [*beginning[:length], *range(number, number + 6)] for number, length in enumerate((22, 0, 16, 22, 9, 22))
    ]
    engine = small_engine(model, 1.6, max_step_tokens=11)
    engine.add(request("aborted", prompts[0]))
    engine.step()
    engine.abort("aborted")
    for again in range(2):
        tokens: dict[tuple[str, int], list[int]] = {(str(n), 0): [] for n in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            engine.add(request(number, prompt, 14 + number))
            if number % 2 or again:
                collect(engine.step(), tokens)
            check_accounts(engine)
        steps = 0
        while engine.has_work:
            collect(engine.step(), tokens)
            check_accounts(engine)
            steps += 1
            assert steps < 1000, "the engine makes no progress"
        assert_nothing_held(engine)
        for number, prompt in enumerate(prompts):
            assert len(tokens[str(number), 0]) == 14 + number
            assert_greedy(model, prompt, tokens[str(number), 0])
    assert engine.scheduler.num_preemptions
    assert engine.scheduler.num_prefix_tokens


MUTATIONS = [
    Mutation(name, plan, function, old, new, ())
    for name, plan, function, old, new in (
        (
            "the name of a block does not say what was before it",
            "cla2",
            blocks.BlockManager._name_blocks,
            "blake2b(before + tokens",
            "blake2b(tokens",
        ),
        (
            "a prefix may be all of the prompt",
            "cla2",
            blocks.BlockManager._count_cached,
            "(len(sequence.tokens) - 1)",
            "len(sequence.tokens)",
        ),
        (
            "blocks that are not full yet are found",
            "cla2",
            blocks.BlockManager.grow,
            "min(length, len(sequence.tokens)) // self.block_size if",
            "-(-min(length, len(sequence.tokens)) // self.block_size) if",
        ),
        (
            "a block that is shared counts one holder",
            "cla2",
            blocks.BlockPool.hold,
            "self.references[block] += 1",
            "self.references[block] = 1",
        ),
        (
            "a block keeps its name when it is used for something else",
            "cla2",
            blocks.BlockPool.take,
            "del self._named[self._names.pop(block)]",
            "pass",
        ),
        (
            "a window gives its blocks back a token too early",
            WINDOWS,
            blocks.BlockManager._first_needed,
            "position - span + 1)",
            "position - span + 2)",
        ),
        (
            "windows keep their blocks",
            WINDOWS,
            scheduler.Scheduler.launched,
            "self.blocks.trim(sequence)",
            "pass",
        ),
        (
            "prefixes do not look whether a window's blocks are there",
            WINDOWS,
            blocks.BlockManager._count_cached,
            "not has_windows(count)",
            "False",
        ),
        (
            "a preempted sequence keeps its blocks",
            "cla2",
            scheduler.Scheduler._make_room,
            "self._stop(last)",
            "last.slot, last.num_cached = -1, 0",
        ),
        (
            "only the last chunk counts",
            "cla2",
            scheduler.Scheduler.launched,
            "num_cached += new",
            "num_cached = new",
        ),
        (
            "a row reads the tables of the one before it",
            "cla2",
            BatchBuilder.on_host,
            "tables.of(row_slots,",
            "tables.of(row_slots - 1,",
        ),
        (
            "the upper layers take the first token of each row",
            WINDOWS,
            BatchBuilder.on_host,
            "ends[asked] - 1",
            "(ends - row_new)[asked]",
        ),
        (
            "values are read from the pool of the keys",
            "fusedkv-lite",
            PreparedModel._add,
            "cache.values[value_source],",
            "cache.keys[key_source],",
        ),
        (
            "an ended sequence keeps its blocks",
            "cla2",
            scheduler.Scheduler.remove,
            "self._stop(sequence)",
            "pass",
        ),
        (
            "an ended sample stays in the books",
            "cla2",
            Engine._end,
            "if not samples:",
            "if samples:",
        ),
    )
]


@pytest.mark.parametrize("plan", ["cla2", WINDOWS, "fusedkv-lite"])
def test_without_a_fault_all_is_well(plan: str) -> None:
    serve(plan)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_fault_is_noticed(mutation: Mutation) -> None:
    with mutation.applied(), pytest.raises((AssertionError, KeyError, IndexError, ValueError, RuntimeError)):
        serve(mutation.plan)
