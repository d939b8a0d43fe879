"""The model over the paged cache: a step's sequences in, logits out. Everything that touches the device is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosslayer.engine.config import EngineConfig
from crosslayer.engine.scheduler import Scheduled
from crosslayer.model import Transformer
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import PagedCache, PagedRow, divide_memory, sequence_bytes

CPU_CACHE_BYTES = 2**30
# Of the memory that is free once the model is on the GPU; the rest is for what a step computes.
GPU_CACHE_SHARE = 0.85


class Runner:
    """A model, on its device and in its own precision, and the cache that it fills.

    Raises:
        UserError: the cache is too small, or a layer's keys and values are kept for different numbers of tokens.
    """

    def __init__(self, model: Transformer, config: EngineConfig, max_length: int) -> None:
        self.model = model.eval()
        weight, block_size = model.lm_head.weight, config.block_size
        self.device = weight.device
        fp8 = config.cache_dtype == "fp8"
        dtype = FP8 if fp8 else weight.dtype
        sequence = sequence_bytes(model.config, block_size, max_length, dtype)
        memory = config.cache_bytes or min(self._free_memory(sequence), config.max_running * sequence)
        num_blocks = divide_memory(model.config, memory, block_size, max_length, dtype)
        scales = slot_scales(model) if fp8 else None
        self.cache = PagedCache(
            model.config, num_blocks, block_size, max_length, dtype=dtype, device=self.device, scales=scales
        )

    def _free_memory(self, sequence: int) -> int:
        if self.device.type != "cuda":
            return max(CPU_CACHE_BYTES, sequence)  # a CPU's memory is taken only as it is written to
        return int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])

    @torch.inference_mode()
    def run(self, step: Sequence[Scheduled]) -> Tensor:
        """Put the new tokens of a step through the model; logits [R, vocab_size] for the R sequences that draw."""
        rows, ids = [], []
        for item in step:
            sequence, start = item.sequence, item.sequence.num_cached
            rows.append(PagedRow(start, item.new, sequence.tables, item.draws))
            ids += sequence.tokens[start : start + item.new]
        hidden = self.model.model(torch.tensor([ids], device=self.device), step=self.cache.begin(rows))
        logits: Tensor = self.model.lm_head(hidden[0])
        return logits
