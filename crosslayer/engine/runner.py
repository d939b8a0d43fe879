"""The model over the paged cache: a step's sequences in, drawn tokens out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosslayer.engine.batch import Batch, BatchBuilder, Shape
from crosslayer.engine.config import EngineConfig
from crosslayer.engine.graphs import capture, graph_shapes
from crosslayer.engine.prepared import PreparedModel
from crosslayer.engine.sampler import Drawn, Draws, OnHost, draw
from crosslayer.engine.scheduler import Scheduled
from crosslayer.engine.transfer import pack, unpack
from crosslayer.errors import UserError
from crosslayer.kernels.tokens import likeliest
from crosslayer.model import Transformer
from crosslayer.model.cache import check_one_pass
from crosslayer.model.fp8 import FP8, slot_scales
from crosslayer.model.paged import PagedCache, divide_memory, sequence_bytes

CPU_CACHE_BYTES = 2**30
# Of the memory that is free once the model is on the GPU; the rest is for what a step computes.
GPU_CACHE_SHARE = 0.85
FP8_SINCE = (8, 9)  # compute capability


def current(device: torch.device) -> torch.accelerator.device_index:
    """Within this, a GPU is the current device, which is the one that streams, graphs and Triton take. Each thread has
    its own."""
    return torch.accelerator.device_index(device.index if device.type == "cuda" else None)


class Runner:
    """A model, laid out for inference on a device in its own precision, and the cache that it fills. A GPU must be
    `current` when a runner is made and used.

    Raises:
        UserError: the cache is too small, a layer's keys and values are kept for different numbers of tokens, or it
            reads a layer above it; or the device has no 8-bit floats and the cache is to be of them.
    """

    def __init__(self, model: Transformer, config: EngineConfig, max_length: int, device: torch.device) -> None:
        check_one_pass(model.config.plan)
        self.device, self.config = device, model.config
        self._on_gpu = device.type == "cuda"
        fp8 = config.cache_dtype == "fp8"
        if fp8 and self._on_gpu and torch.cuda.get_device_capability(device) < FP8_SINCE:
            raise UserError("this GPU has no 8-bit floats for a cache; they came with compute capability 8.9")
        weight, block_size = model.lm_head.weight, config.block_size
        dtype = FP8 if fp8 else weight.dtype
        scales = slot_scales(model.eval()) if fp8 else None
        self.model = PreparedModel(model, max_length, device)
        sequence = sequence_bytes(model.config, block_size, max_length, dtype)
        # In float64 attention is plain PyTorch, whose shapes depend on the lengths of sequences.
        shapes = graph_shapes(config.max_running) if self._on_gpu and weight.dtype != torch.float64 else []
        logits = sum(shape.rows for shape in shapes) * weight[:, 0].nbytes  # each graph keeps its own
        memory = config.cache_bytes or min(self._free_memory(sequence) - logits, config.max_running * sequence)
        num_blocks = divide_memory(model.config, max(0, memory), block_size, max_length, dtype)
        self.cache = PagedCache(
            model.config, num_blocks, block_size, max_length, dtype=dtype, device=device, scales=scales
        )
        # On a GPU, what is launched is not done yet when `launch` returns.
        self.overlaps = self._on_gpu
        self.builder = BatchBuilder(self.cache, config.max_running)
        # The token last drawn in each slot, also while the host does not know it yet.
        self._last = torch.zeros(config.max_running + 1, dtype=torch.int64, device=device)
        self._graphs = capture(self.compute, self.builder, shapes) if shapes else {}

    @torch.inference_mode()
    def launch(self, step: Sequence[Scheduled]) -> Draws:
        """Put the new tokens of a step through the model, and draw a token for each sequence that is complete.

        On a GPU this returns before any of it is done; what it needs of the sequences has been read by then. A token
        that the host does not know yet is the one that its sequence's slot drew last.
        """
        drawing = [item.sequence for item in step if item.draws]
        shape = self._graphed_shape(step, len(drawing))
        host = self.builder.on_host(step, shape)
        on_host = None
        if shape is None:
            packed = pack(host.arrays, pinned=self._on_gpu).to(self.device, non_blocking=True)
            batch = self.builder.on_device(host, unpack(packed, host.arrays))
            logits, tokens = self.compute(batch)
        else:
            graphed = self._graphs[shape]
            logits, tokens, on_host = graphed(host)
            batch = graphed.batch
        count = len(drawing)
        if not all(sequence.request.params.is_plain for sequence in drawing):
            drawn = draw(logits[:count], drawing)
            self._last.index_copy_(0, batch.drawing_slots[:count], drawn.tokens)
            return Draws.of(drawn)
        if on_host is None:
            return Draws.of(Drawn(tokens))
        return Draws(OnHost(on_host.tokens[:count], on_host.event))

    def compute(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, vocab_size] and their likeliest tokens [n], which count as drawn unless others are."""
        logits = self.model.logits(batch, self._last, self.cache)
        return logits, likeliest(logits, batch.drawing_slots, self._last)

    def _graphed_shape(self, step: Sequence[Scheduled], num_drawing: int) -> Shape | None:
        """The smallest shape that there is a graph for and that has room for a step."""
        num_tokens = sum(item.new for item in step)
        one_each = num_drawing == num_tokens
        return next(
            (
                shape
                for shape in self._graphs
                if shape.is_one_each == one_each and shape.tokens >= num_tokens and shape.rows >= len(step)
            ),
            None,
        )

    def _free_memory(self, sequence: int) -> int:
        if not self._on_gpu:
            return max(CPU_CACHE_BYTES, sequence)  # a CPU's memory is taken only as it is written to
        torch.cuda.empty_cache()
        return int(GPU_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
