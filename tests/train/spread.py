"""Training steps by several processes, to be compared with the same steps by one."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from crosslayer.data import Batch
from crosslayer.data.prepared import open_prepared
from crosslayer.errors import Stopped, UserError
from crosslayer.train import Recipe, joined_processes, train
from crosslayer.train import step as step_module
from crosslayer.train.parallel import whole_model
from crosslayer.train.step import StepOutput, TrainStep
from tests.conftest import tiny_config
from tests.model.checks import random_model
from tests.train.runs import config

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
    """Train a model of random weights, gains and biases, in float64 or, on GPUs, whose kernels have no float64, in
    float32; None on all processes but the first."""
    on_gpus = mesh is not None and mesh.device_type == "cuda"
    model = random_model(tiny_config(case.plan, **{"vocab_size": 64, **case.model}))
    model = model.float() if on_gpus else model.double()
    settings = {"batch_size": ROWS, "sequence_length": LENGTH, "learning_rate": 1e-2}
    settings |= {"precision": "fp32", "compile": False}
    recipe = Recipe(tokens=STEPS * ROWS * LENGTH, **{**settings, **case.recipe}, tensor_parallel=case.tensor_parallel)
    step = TrainStep(model, recipe, mesh)
    gradients: dict[str, Tensor] = {}
    plain = step_module.clipped_step

    def look(*arguments: Any) -> Tensor:
        for name, parameter in model.named_parameters():
            if name not in gradients:
                assert parameter.grad is not None, name
                grad = parameter.grad
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                gradients[name] = whole.cpu().clone()  # the step scales it
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


def write_trace(case: Case, file: Path, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Run by every process: the trace of a case to a file."""
    with joined_processes(Recipe(device=device, tensor_parallel=case.tensor_parallel)) as processes:
        found = trace(case, processes.mesh)
        if found is not None:
            torch.save(found, file)


def write_run(data_folder: Path, out: Path, settings: dict[str, Any]) -> None:
    """Run by every process: a whole training run."""
    with joined_processes(config(**settings).train) as processes:
        train(config(**settings), open_prepared(data_folder), out, processes=processes)


def write_stopped_run(data_folder: Path, out: Path, settings: dict[str, Any], step: int) -> None:
    """Run by every process: a training run, in which the last process gets SIGTERM in the middle of a step."""
    plain = TrainStep.__call__

    def asked(self: TrainStep, number: int, batch: Batch) -> StepOutput:
        if number == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            signal.raise_signal(signal.SIGTERM)
        return plain(self, number, batch)

    TrainStep.__call__ = asked  # type: ignore[method-assign]
    try:
        write_run(data_folder, out, settings)
    except Stopped:
        dist.destroy_process_group()
    finally:
        TrainStep.__call__ = plain  # type: ignore[method-assign]


def fail_on_first(file: Path) -> None:
    """Run by every process: what each is told of a UserError that only the first one meets, to file-RANK."""

    def fail() -> None:
        raise UserError("no such corpus")

    with joined_processes(Recipe(device="cpu")) as processes:
        try:
            processes.first_alone(fail)
        except UserError as error:
            file.with_name(f"{file.name}-{os.environ['RANK']}").write_text(str(error))


def in_processes(count: int, calls: Sequence[Callable[[], None]]) -> None:
    """Make each call in `count` new processes, in an environment such as torchrun gives them."""
    # A port a call: the first process may still have the last call's open when the others start the next.
    multiprocessing.spawn(_enter, (count, _free_ports(len(calls)), calls), nprocs=count)


def _free_ports(count: int) -> list[int]:
    """From below those that the system gives to connections, as one of these may be gone before it is used."""
    free: list[int] = []
    for port in random.sample(range(15_000, 32_000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            free.append(port)
        if len(free) == count:
            break
    return free


def _enter(rank: int, count: int, ports: Sequence[int], calls: Sequence[Callable[[], None]]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    for port, call in zip(ports, calls, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        call()
