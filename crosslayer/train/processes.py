"""The processes of a training run: torchrun starts them, each finds its place here, and some work is the first one's.

With T = `tensor_parallel`, rank r has data rank r // T and tensor rank r % T. Processes of one tensor rank train on
different rows of a batch; those of one data rank share the same rows and hold parts of the same matrices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from crosslayer.environment import started_processes
from crosslayer.errors import UserError
from crosslayer.train.config import Recipe
from crosslayer.train.host import choose_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """All processes of a run as a mesh with the dimensions "data" and "tensor", or None where there is only this one.

    `waiting` is a group for waits of any length: collectives of the others give up after some minutes.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    waiting: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.mesh is None or self.mesh.get_rank() == 0

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The processes among which batches are divided."""
        return None if self.mesh is None else self.mesh.get_group("data")

    @property
    def data_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def data_size(self) -> int:
        return 1 if self.mesh is None else self.mesh["data"].size()

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, given to all of them; so is a UserError that it raises."""
        if self.mesh is None:
            return work()
        outcome: list[T | str | None] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.waiting)
        result, error_message = outcome
        if error_message is not None:
            raise UserError(error_message)
        return result  # type: ignore[return-value]

    def first_alone(self, work: Callable[[], T]) -> T:
        """What `work` returns here, called on the first process before the others: for work that fills a cache."""
        done: list[T] = []
        self.on_first(lambda: done.append(work()))
        return done[0] if done else work()


@contextmanager
def joined_processes(recipe: Recipe) -> Iterator[Processes]:
    """Join the other processes that torchrun started, if it did; the group is dissolved after the block.

    Raises:
        UserError: `tensor_parallel` does not divide the number of processes, this one's device cannot be used, or the
            environment does not say where the others are.
    """
    count = started_processes()
    if count == 1:
        yield single_process(recipe)
        return
    _check_tensor_parallel(recipe, count)
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE={count} without {', '.join(missing)}: start them with torchrun, or unset it")
    device = choose_device(recipe.device, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shape = (count // recipe.tensor_parallel, recipe.tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    yield Processes(device, mesh, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    # Not after an error: the others may be in a collective, which only the end of this process ends.
    dist.destroy_process_group()


def single_process(recipe: Recipe) -> Processes:
    """This process alone, whatever the environment says.

    Raises:
        UserError: the recipe asks for several, or the device cannot be used.
    """
    _check_tensor_parallel(recipe, 1)
    return Processes(choose_device(recipe.device))


def _check_tensor_parallel(recipe: Recipe, processes: int) -> None:
    if processes % (ranks := recipe.tensor_parallel):
        raise UserError(
            f"train.tensor_parallel {ranks} must divide the number of processes, {processes}; "
            f"torchrun --nproc-per-node {ranks} -m crosslayer train ... starts {ranks}"
        )
