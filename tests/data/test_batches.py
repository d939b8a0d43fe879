"""Batches: a pure function of (seed, step), each window once an epoch, the same rows for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest

from crosslayer.data import TokenStream, TrainBatches
from crosslayer.errors import UserError

EOS = 7


def counting_stream(length: int, shards: int = 3) -> TokenStream:
    """Tokens 0, 1, 2, …, so that a token tells its place."""
    records = np.arange(length, dtype="<u4").view([("token", "<u4")])
    return TokenStream(np.array_split(records, shards), documents=1, text_bytes=length)


def test_a_window_is_inputs_and_the_tokens_after_them() -> None:
    batches = TrainBatches(counting_stream(101), batch_size=4, sequence_length=10, seed=0)
    batch = batches[3]
    assert batch.inputs.shape == batch.targets.shape == (4, 10)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert (batch.targets == batch.inputs + 1).all()
    assert (batch.inputs == batch.inputs[:, :1] + np.arange(10)).all()
    assert (batch.inputs[:, 0] % 10 == 0).all()
    assert batch.document_ids is None


@pytest.mark.parametrize(("length", "windows"), [(101, 10), (100, 9), (110, 10), (111, 11), (11, 1)])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_an_epoch_predicts_every_token_once(length: int, windows: int, batch_size: int) -> None:
    batches = TrainBatches(counting_stream(length), batch_size=batch_size, sequence_length=10, seed=5)
    assert batches.windows == windows
    rows = np.concatenate([batches[step].targets for step in range(-(-3 * windows // batch_size))])
    for epoch in range(3):
        seen = np.sort(rows[epoch * windows : (epoch + 1) * windows].ravel())
        assert (seen == np.arange(1, windows * 10 + 1)).all()


def test_the_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return (
            TrainBatches(counting_stream(2001), batch_size=200, sequence_length=10, seed=seed)[epoch]
            .inputs[:, 0]
            .tolist()
        )

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(o != sorted(o) for o in orders)
    assert order(1, 1) == orders[3]


def test_the_order_is_pinned() -> None:
    """A run that is resumed under another version must see the same data; this order may never change."""
    batches = TrainBatches(counting_stream(101), batch_size=5, sequence_length=10, seed=1234)
    assert [(batches[step].inputs[:, 0] // 10).tolist() for step in range(4)] == [
        [5, 6, 3, 9, 7],
        [4, 1, 2, 8, 0],
        [9, 2, 0, 7, 6],
        [1, 8, 4, 5, 3],
    ]


def test_a_step_needs_no_steps_before_it() -> None:
    stream = counting_stream(1234)
    running = TrainBatches(stream, batch_size=6, sequence_length=7, seed=3)
    forwards = [running[step].inputs for step in range(100)]
    for step in (99, 50, 0, 29, 30, 98):
        fresh = TrainBatches(stream, batch_size=6, sequence_length=7, seed=3)
        assert (fresh[step].inputs == forwards[step]).all()
        assert (running[step].inputs == forwards[step]).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 12])
def test_workers_share_the_same_global_batch(world_size: int) -> None:
    stream = counting_stream(500)
    whole = TrainBatches(stream, batch_size=12, sequence_length=9, seed=2, eos_id=EOS)
    parts = [
        TrainBatches(stream, batch_size=12, sequence_length=9, seed=2, eos_id=EOS, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in range(12):
        for name in ("inputs", "targets", "document_ids"):
            together = np.concatenate([getattr(part[step], name) for part in parts])
            assert (together == getattr(whole[step], name)).all()


def test_document_ids_change_after_end_of_text() -> None:
    tokens = [1, 2, EOS, EOS, 3, 4, 5, EOS, 6, 7 + 1]
    stream = TokenStream([np.array(tokens, dtype="<u2").view([("token", "<u2")])], documents=3, text_bytes=1)
    batch = TrainBatches(stream, batch_size=1, sequence_length=9, seed=0, eos_id=EOS)[0]
    assert batch.inputs[0].tolist() == tokens[:-1]
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3]


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(UserError, match="has 10 tokens, fewer than one window of sequence_length \\+ 1 = 11"):
        TrainBatches(counting_stream(10), batch_size=1, sequence_length=10, seed=0)
    with pytest.raises(UserError, match="batch_size 4 must be a positive multiple of the number of workers, 3"):
        TrainBatches(counting_stream(100), batch_size=4, sequence_length=10, seed=0, world_size=3)
    with pytest.raises(UserError, match="sequence_length must be positive"):
        TrainBatches(counting_stream(100), batch_size=4, sequence_length=0, seed=0)
