"""The model over the paged cache: a step's sequences in, their next tokens out. Everything that touches the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crosslayer.engine.config import EngineConfig
from crosslayer.engine.sampler import Draws, draw
from crosslayer.engine.scheduler import Scheduled
from crosslayer.model import Transformer
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import PagedCache, PagedRow, divide_memory, sequence_bytes

CPU_CACHE_BYTES = 2**30
# Of the memory that is free once the model is on the GPU; the rest is for what a step computes.
GPU_CACHE_SHARE = 0.85


class Runner:
    """A model, on its device and in its own precision, and the cache that it fills.

    `overlaps`: a step that was launched is not done yet, so that it pays to launch the next one before it is.

    Raises:
        UserError: the cache is too small, or a layer's keys and values are kept for different numbers of tokens.
    """

    def __init__(self, model: Transformer, config: EngineConfig, max_length: int) -> None:
        self.model = model.eval()
        weight, block_size = model.lm_head.weight, config.block_size
        self.device = weight.device
        self.overlaps = self.device.type == "cuda"
        fp8 = config.cache_dtype == "fp8"
        dtype = FP8 if fp8 else weight.dtype
        sequence = sequence_bytes(model.config, block_size, max_length, dtype)
        memory = config.cache_bytes or min(self._free_memory(sequence), config.max_running * sequence)
        num_blocks = divide_memory(model.config, memory, block_size, max_length, dtype)
        scales = slot_scales(model) if fp8 else None
        self.cache = PagedCache(
            model.config, num_blocks, block_size, max_length, dtype=dtype, device=self.device, scales=scales
        )
        self._last_tokens = torch.zeros(config.max_running, dtype=torch.int64, device=self.device)  # by slot

    def _free_memory(self, sequence: int) -> int:
        if self.device.type != "cuda":
            return max(CPU_CACHE_BYTES, sequence)  # a CPU's memory is taken only as it is written to
        return int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])

    @torch.inference_mode()
    def launch(self, step: Sequence[Scheduled]) -> Draws:
        """Put the new tokens of a step through the model and draw the next ones, without waiting for a GPU.

        Blocks and tokens of the sequences are read before it returns. A token that is still pending is the one that the
        sequence's slot drew last.
        """
        rows, ids, pending = [], [], []
        for item in step:
            sequence, start = item.sequence, item.sequence.num_cached
            rows.append(PagedRow(start, item.new, sequence.tables, item.draws))
            known = sequence.tokens[start : start + item.new]
            ids += known
            if len(known) < item.new:
                pending.append((len(ids), sequence.slot))
                ids.append(0)
        batch = torch.tensor(ids, device=self.device)
        if pending:
            places, slots = torch.tensor(pending, device=self.device).unbind(1)
            batch[places] = self._last_tokens[slots]
        hidden = self.model.model(batch[None], step=self.cache.begin(rows))
        drawing = [item.sequence for item in step if item.draws]
        drawn = draw(self.model.lm_head(hidden[0]), drawing)
        slots = torch.tensor([sequence.slot for sequence in drawing], dtype=torch.int64, device=self.device)
        self._last_tokens[slots] = drawn.tokens
        return Draws(drawn)
