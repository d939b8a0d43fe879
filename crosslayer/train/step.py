"""One optimizer step: forward, backward, clip, update."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crosslayer.data import Batch
from crosslayer.model import Transformer
from crosslayer.train.config import Recipe
from crosslayer.train.host import autocast
from crosslayer.train.optimizer import clipped_step, learning_rate_at, make_optimizer


class StepOutput(NamedTuple):
    """Mean loss of a batch, and the norm of its gradients before clipping: scalars on the device."""

    loss: Tensor
    grad_norm: Tensor


class TrainStep:
    """A model, its optimizer, and how a batch updates them. The model must be on its device already."""

    def __init__(self, model: Transformer, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.device = model.lm_head.weight.device
        self.optimizer = make_optimizer(
            model,
            learning_rate=recipe.learning_rate,
            betas=(recipe.betas[0], recipe.betas[1]),
            weight_decay=recipe.weight_decay,
        )
        model.model.activation_checkpointing = recipe.activation_checkpointing
        if recipe.compile if recipe.compile is not None else self.device.type == "cuda":
            # Block by block: layers of one kind share their compiled code, so compiling takes seconds at any depth.
            for block in model.model.layers:
                block.compile()

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
        micro = recipe.micro_batch_size or recipe.batch_size
        total = torch.zeros((), device=self.device)
        for start in range(0, recipe.batch_size, micro):
            loss = self._loss(batch, slice(start, start + micro)) / recipe.tokens_per_step
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = clipped_step(self.optimizer, recipe.clip)
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutput(total, norm)

    def _loss(self, batch: Batch, rows: slice) -> Tensor:
        """Summed loss of some rows of a batch."""

        def on_device(name: str) -> Tensor | None:
            array = getattr(batch, name)
            if array is None:
                return None
            tensor = torch.from_numpy(array[rows])
            # From pinned memory the copy does not wait for the work that the device still has queued.
            return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

        inputs, targets = on_device("inputs"), on_device("targets")
        assert inputs is not None
        assert targets is not None
        with autocast(self.device, self.recipe.precision):
            loss: Tensor = self.model(inputs, targets, document_ids=on_device("document_ids"))
        return loss
