"""Training steps by several processes, to be compared with the same steps by one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from crosslayer.data import Batch
from crosslayer.train import Recipe, joined_processes
from crosslayer.train import step as step_module
from crosslayer.train.parallel import whole_model
from crosslayer.train.step import TrainStep
from tests.conftest import tiny_config
from tests.model.checks import random_model

ROWS, LENGTH, STEPS = 8, 12, 4


@dataclass(frozen=True)
class Case:
    """A plan, by how many tensor ranks it is run, and what differs from the tiny model and a plain recipe."""

    plan: str
    tensor_parallel: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    documents: bool = False

    @property
    def name(self) -> str:
        settings = {**self.model, **self.recipe}
        parts = [self.plan, f"TP{self.tensor_parallel}", *(f"{key}={value}" for key, value in settings.items())]
        return " ".join([*parts, *["documents"] * self.documents])


@dataclass
class Trace:
    """What some steps did: loss and gradient norm of each, gradients of the first, weights after the last."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def trace(case: Case, mesh: DeviceMesh | None = None) -> Trace | None:
    """Train a model of float64 weights, gains and biases drawn at random; None on all processes but the first."""
    model = random_model(tiny_config(case.plan, **{"vocab_size": 64, **case.model})).double()
    settings = {"batch_size": ROWS, "sequence_length": LENGTH, "learning_rate": 1e-2, "precision": "fp32"}
    recipe = Recipe(tokens=STEPS * ROWS * LENGTH, **{**settings, **case.recipe}, tensor_parallel=case.tensor_parallel)
    step = TrainStep(model, recipe, mesh)
    gradients: dict[str, Tensor] = {}
    plain = step_module.clipped_step

    def look(*arguments: Any) -> Tensor:
        for name, parameter in model.named_parameters():
            if name not in gradients:
                assert parameter.grad is not None, name
                grad = parameter.grad
                gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
        return plain(*arguments)

    step_module.clipped_step = look
    try:
        outputs = [step(number, _part(batch(number, case.documents), mesh)) for number in range(STEPS)]
    finally:
        step_module.clipped_step = plain
    whole = model if mesh is None else whole_model(model)
    if whole is None:
        return None
    weights = {name: weight.detach() for name, weight in whole.named_parameters()}
    return Trace([o.loss.item() for o in outputs], [o.grad_norm.item() for o in outputs], gradients, weights)


def batch(number: int, documents: bool) -> Batch:
    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 64, (ROWS, LENGTH + 1))
    ids = np.sort(rng.integers(0, 3, (ROWS, LENGTH)), axis=1) if documents else None
    return Batch(tokens[:, :-1], tokens[:, 1:], ids)


def _part(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    if mesh is None:
        return batch
    size = ROWS // mesh["data"].size()
    rows = slice(size * mesh.get_local_rank("data"), size * (mesh.get_local_rank("data") + 1))
    ids = None if batch.document_ids is None else batch.document_ids[rows]
    return replace(batch, inputs=batch.inputs[rows], targets=batch.targets[rows], document_ids=ids)


def trace_cases(folder: Path, cases: Sequence[Case]) -> None:
    """Run by every process: the trace of case n to folder/n.pt."""
    for number, case in enumerate(cases):
        with joined_processes(Recipe(device="cpu", tensor_parallel=case.tensor_parallel)) as processes:
            found = trace(case, processes.mesh)
            if found is not None:
                torch.save(found, folder / f"{number}.pt")


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function` in `count` new processes with the environment that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_enter, (count, port, function, arguments), nprocs=count)


def _enter(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*arguments)
