"""The model over the paged cache: a step's sequences in, logits out. Everything that touches the device is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosslayer.engine.scheduler import Scheduled
from crosslayer.model import Transformer
from crosslayer.model.paged import PagedCache, PagedRow


class Runner:
    """A model, on its device and in its own precision, and the cache that it fills."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model = model.eval()
        self.cache = cache

    @torch.inference_mode()
    def run(self, step: Sequence[Scheduled]) -> Tensor:
        """Put the new tokens of a step through the model; logits [R, vocab_size] for the R sequences that draw."""
        rows, ids = [], []
        for item in step:
            sequence, start = item.sequence, item.sequence.num_cached
            rows.append(PagedRow(start, item.new, sequence.tables, item.draws))
            ids += sequence.tokens[start : start + item.new]
        hidden = self.model.model(torch.tensor([ids], device=self.cache.device), step=self.cache.begin(rows))
        logits: Tensor = self.model.lm_head(hidden[0])
        return logits
