"""Training batches addressed by step: which tokens a step sees depends on the seed and the step and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosslayer.data.shards import TokenStream
from crosslayer.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Token ids `inputs` and `targets`, int64 [B, T]; the target at t is the token after the input at t.

    `document_ids`, int64 [B, T], where packed documents must not see each other: tokens of one row may attend to each
    other only where their ids are equal. They count up along a row, from 0, after each end-of-text token.
    """

    inputs: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None = None


class TrainBatches:
    """`batches[step]`: the batch of a training step, for every step from 0 on.

    The stream is cut into windows of sequence_length + 1 tokens at a stride of sequence_length, so that each token but
    the first is predicted once an epoch; what is left at the end, less than a window, is not used. Each epoch goes
    through all windows in an order drawn from (seed, epoch), and batches run on from one epoch into the next.

    `batch_size` is the number of rows over all workers: worker `rank` of `world_size` gets its part of the same global
    batch, so the order is the same for any number of workers. `eos_id` asks for document ids. `windows` is the number
    of windows in an epoch.

    Raises:
        UserError: fewer tokens than one window, or a batch size that the workers cannot share evenly.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        eos_id: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length must be positive, got {sequence_length!r}")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch_size {batch_size} must be a positive multiple of the number of workers, {world_size}"
            )
        if len(stream) <= sequence_length:
            raise UserError(
                f"the training text has {len(stream):,} tokens, fewer than one window of sequence_length + 1 = "
                f"{sequence_length + 1:,}; give more text or a shorter sequence_length"
            )
        self.windows = (len(stream) - 1) // sequence_length
        self._stream = stream
        self._length = sequence_length
        self._batch_size = batch_size
        self._rows = batch_size // world_size
        self._first_row = rank * self._rows
        self._seed = seed
        self._eos_id = eos_id
        self._orders: dict[int, np.ndarray] = {}

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch_size + self._first_row
        numbers = [self._window(place) for place in range(first, first + self._rows)]
        starts = [number * self._length for number in numbers]
        rows = np.stack([self._stream.read(start, start + self._length + 1) for start in starts])
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if self._eos_id is None:
            return Batch(inputs, targets)
        ended = inputs == self._eos_id
        return Batch(inputs, targets, np.cumsum(ended, axis=1) - ended)

    def _window(self, place: int) -> int:
        """The window at a place in the endless sequence of all epochs."""
        epoch, place = divmod(place, self.windows)
        if epoch not in self._orders:
            # Raw bits and a stable sort: numpy promises the same bits for every version, but not the same shuffle.
            bits = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.windows)
            # A batch may span two epochs, so the one before is kept.
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return int(self._orders[epoch][place])
