"""Sequences in a paged cache, without an engine around them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from crosslayer.engine import Request
from crosslayer.engine.batch import BatchBuilder, Shape
from crosslayer.engine.prepared import PreparedModel
from crosslayer.engine.request import Sequence
from crosslayer.engine.scheduler import Scheduled
from crosslayer.engine.transfer import pack, unpack
from crosslayer.model import Transformer
from crosslayer.model.paged import BlockTable, PagedCache, SlotScales, slots_of_spans

NUM_BLOCKS = 60
CPU = torch.device("cpu")


class Rows:
    """Sequences in a paged cache, with a naive allocator that frees what no window reaches and reuses it at once."""

    def __init__(
        self,
        model: Transformer,
        count: int,
        block_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        scales: SlotScales | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.prepared = PreparedModel(model, max_length, device)
        spans = slots_of_spans(model.config, max_length)
        self.cache = PagedCache(
            model.config,
            dict.fromkeys(spans, NUM_BLOCKS),
            block_size,
            max_length,
            dtype=dtype,
            device=device,
            scales=scales,
        )
        for pool in (*self.cache.keys.values(), *self.cache.values.values()):
            pool.fill_(100.0)  # what other sequences left behind
        self.builder = BatchBuilder(self.cache, count)
        self.last = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.sequences = [
            Sequence(Request(str(n), (0,)), 0, 0, max_length, frozenset(), None, [], slot=n) for n in range(count)
        ]
        for sequence in self.sequences:
            sequence.tables = {span: BlockTable() for span in spans}
        self.free = {span: list(range(NUM_BLOCKS)) for span in spans}
        self.random = random.Random(0)

    def feed(self, tokens: Tensor, new: list[int], wanted: list[bool], shape: Shape | None = None) -> Tensor:
        """Logits of the last new token of each wanted row that has any."""
        size, step = self.cache.block_size, []
        for sequence, row, count, draws in zip(self.sequences, tokens.tolist(), new, wanted, strict=True):
            if not count:
                continue
            start = sequence.num_cached
            for span, table in sequence.tables.items():
                first = max(0, start - span + 1) // size if span < self.cache.max_length else 0
                while table.blocks and table.first < first:
                    self.free[span].append(table.blocks.pop(0))
                    table.first += 1
                while (table.first + len(table.blocks)) * size < start + count:
                    place = self.random.randrange(len(self.free[span]))
                    table.blocks.append(self.free[span].pop(place))
            sequence.tokens = row[: start + count]
            step.append(Scheduled(sequence, count, draws))
        self.host = self.builder.on_host(step, shape)
        packed = pack(self.host.arrays, pinned=False).to(self.cache.device)
        self.batch = self.builder.on_device(self.host, unpack(packed, self.host.arrays))
        logits = self.prepared.logits(self.batch, self.last, self.cache)
        for item in step:
            item.sequence.num_cached += item.new
        return logits
