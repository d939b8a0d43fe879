"""One optimizer step: forward, backward, clip, update."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.compiler.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from crosslayer.data import Batch
from crosslayer.model import Transformer
from crosslayer.plan.cost import forward_flops_per_token
from crosslayer.train.config import Recipe
from crosslayer.train.graph import GraphedLoss
from crosslayer.train.host import autocast, uses_bf16
from crosslayer.train.optimizer import clipped_step, learning_rate_at, make_optimizer
from crosslayer.train.parallel import parallelize

# About 50 ms of an H100's work.
GRAPH_FLOPS = 2e13
# Kinds of blocks, times the ways they are run (with gradients, without, to evaluate), that are compiled. Beyond
# PyTorch's own limit, 8, they would silently run uncompiled, and plans with several passes have more.
MOST_KINDS = 32


class StepOutput(NamedTuple):
    """Mean loss of a batch and the norm of its gradients before clipping, over all processes: scalars on the device."""

    loss: Tensor
    grad_norm: Tensor


class TrainStep:
    """A model, its optimizer, and how a batch updates them.

    A single process brings a model that is on its device. With a mesh, of the dimensions "data" and "tensor", each
    process brings the same model and its own part of the batch; the model is then spread over the mesh.

    Raises:
        UserError: the model or the batch cannot be divided among the processes.
    """

    def __init__(self, model: Transformer, recipe: Recipe, mesh: DeviceMesh | None = None) -> None:
        self.model = model
        self.recipe = recipe
        self.data_group = None if mesh is None else mesh.get_group("data")
        self.micro_batch_size = recipe.micro_batch_of(1 if mesh is None else mesh["data"].size())
        if mesh is not None:
            parallelize(model, mesh, bf16=uses_bf16(torch.device(mesh.device_type), recipe.precision))
        self.device = model.lm_head.weight.device
        self.optimizer = make_optimizer(
            model,
            learning_rate=recipe.learning_rate,
            betas=(recipe.betas[0], recipe.betas[1]),
            weight_decay=recipe.weight_decay,
        )
        model.model.activation_checkpointing = recipe.activation_checkpointing
        if recipe.compile if recipe.compile is not None else self.device.type == "cuda":
            torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MOST_KINDS)
            # Block by block: layers of one kind share their compiled code, so compiling takes seconds at any depth.
            for block in model.model.layers:
                block.compile()
        self._graphed = GraphedLoss(self._loss, model.parameters()) if self._launches_are_slow() else None

    def _launches_are_slow(self) -> bool:
        """Whether a GPU is done with a micro batch before the CPU has launched its kernels, and a graph can help.

        The CPU takes about 40 ms for twelve layers; a graph of what takes longer wins nothing and costs memory. The
        masks of windows and documents cannot be captured, and what several processes say to each other is not.
        """
        recipe, config = self.recipe, self.model.config
        masked = recipe.mask_documents or any(window is not None for window in config.plan.windows)
        tokens = self.micro_batch_size * recipe.sequence_length
        # Of one pass: several are more work, but as many more launches.
        flops = 3 * tokens * forward_flops_per_token(config, recipe.sequence_length, passes=1)
        alone = self.device.type == "cuda" and self.data_group is None
        return alone and not masked and flops < GRAPH_FLOPS

    def __call__(self, step: int, batch: Batch) -> StepOutput:
        """Update the weights with step number `step` (from 0)."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step,
                recipe.steps,
                peak=recipe.learning_rate,
                warmup_ratio=recipe.warmup_ratio,
                final_ratio=recipe.final_ratio,
            )
        micro, rows = self.micro_batch_size, len(batch.inputs)
        total = torch.zeros((), device=self.device)
        for start in range(0, rows, micro):
            inputs, targets, document_ids = (
                self._on_device(array, slice(start, start + micro))
                for array in (batch.inputs, batch.targets, batch.document_ids)
            )
            assert inputs is not None
            assert targets is not None
            if self._graphed is not None:
                total += self._graphed(inputs, targets, accumulate=start > 0)
                continue
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(start + micro >= rows)
            loss = self._loss(inputs, targets, document_ids)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.data_group is not None:
            dist.all_reduce(total, group=self.data_group)
        norm = clipped_step(self.optimizer, recipe.clip)
        if self._graphed is None:
            self.optimizer.zero_grad(set_to_none=True)
        return StepOutput(total, norm)

    def _loss(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What some rows add to the mean loss of the batch."""
        with autocast(self.device, self.recipe.precision):
            loss: Tensor = self.model(inputs, targets, document_ids=document_ids)
        return loss / self.recipe.tokens_per_step

    def _on_device(self, array: np.ndarray | None, rows: slice) -> Tensor | None:
        if array is None:
            return None
        tensor = torch.from_numpy(array[rows])
        # From pinned memory the copy does not wait for the work that the device still has queued.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
