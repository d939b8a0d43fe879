"""Training state: everything needed to go on from a step as if nothing had happened, on any number of processes.

A checkpoint is a folder `step-00001000` in which every process has put the part of the weights and of the optimizer's
moments that it holds, as one safetensors file. The planners of torch.distributed.checkpoint decide who writes what and,
when another number of processes reads it, where each piece is found; the files are laid out as its
HuggingFaceStorageReader expects them. Its default storage would keep a pickle, and its own writers have no place for
checksums. What is not a tensor is JSON. Data order is a function of (seed, step), so no sampler or generator state is
kept.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from crosslayer.checkpoint.files import CHECKSUMS, check_folder, seal, sha256
from crosslayer.errors import UserError
from crosslayer.files import flush, read_json, write_json
from crosslayer.ranks import gather, rank, side_group

KEPT = 2
PROGRESS = "state.json"


class Checkpoints:
    """The checkpoints of a run, in `folder`. With several processes all of them make one, and call it alike.

    A checkpoint is whole or not there: it is written into a scratch folder, checksummed, flushed to the disk and
    renamed once every process has written its part. The newest two are kept, so there must be room for three. The
    folder must be one that all processes see.

    One that cannot be written, because the disk is full for instance, is reported by a warning and counted in `failed`
    (of rank 0), and training goes on: the ones before it are kept, the next may succeed once there is room, and a run
    that stops by itself would lose more than one that goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = 0
        self._group = side_group()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, whole or damaged, oldest first."""
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]) -> None:
        """Copy the state to the CPU's memory, and write it to `folder/step-…` while the caller goes on.

        `progress` is any JSON, of which rank 0's counts. Waits first until the checkpoint before is written.
        """
        self.wait()
        if rank() == 0:
            for scratch in self.folder.glob(".step-*"):  # of a process that was killed
                shutil.rmtree(scratch, ignore_errors=True)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(_state(model, optimizer), is_coordinator=rank() == 0)
        plans, _ = planner.create_global_plan(gather(planner.create_local_plan(), self._group))
        offsets = {}
        for item in plans[rank()].items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            offsets[name] = [*(item.index.offset or ())]
            if name not in self._copies:  # the memory serves one checkpoint after the other
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        self._writing = self._background.submit(self._write, step, offsets, {"step": step, **progress})

    def wait(self) -> None:
        """Until the checkpoint that is being written is on the disk, or has failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread that writes."""
        self.wait()
        self._background.shutdown()

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, step: int | None = None
    ) -> dict[str, Any] | None:
        """Restore the newest whole checkpoint, or that of `step`, into `model` and `optimizer`, however they are
        sharded; return its progress, or None without one.

        A damaged checkpoint is passed over, with a warning, for the one before it.

        Raises:
            UserError: there is no whole checkpoint of the `step` asked for, or none at all among those that are there,
                or it is one of another model.
        """
        # Rank 0 decides for all, so that none resumes from another step than the rest.
        found = (self._newest_whole(step), self.steps()) if rank() == 0 else (None, [])
        progress, steps = gather(found, self._group)[0]
        if progress is None:
            if step is not None:
                raise UserError(f"{self.folder}: no whole checkpoint of step {step}; there are those of {steps}")
            if steps:  # starting again would overwrite what may be mended
                raise UserError(f"{self.folder}: no whole checkpoint in it; remove it to start from the beginning")
            return None
        path = self._path(progress["step"])
        try:
            _restore(path, model, optimizer)
        except (KeyError, ValueError, RuntimeError) as error:  # of the planner, or a parameter that is not there
            raise UserError(f"{path}: not a checkpoint of this model: {str(error).splitlines()[0]}") from error
        return progress

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _newest_whole(self, step: int | None) -> dict[str, Any] | None:
        for candidate in reversed(self.steps()):
            if step not in (None, candidate):
                continue
            try:
                path = self._path(candidate)
                read_json(path / CHECKSUMS)
                check_folder(path)
                progress = read_json(path / PROGRESS)
                if progress.get("step") != candidate:
                    raise UserError(f"{path}: is that of step {progress.get('step')}, renamed")
                return progress
            except UserError as error:
                warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=3)
        return None

    def _write(self, step: int, offsets: dict[str, list[int]], progress: dict[str, Any]) -> None:
        """Runs in the background on every process; `offsets` says where in its tensor each piece begins."""
        scratch = self.folder / f".step-{step:08d}"
        part = scratch / f"rank-{rank():05d}.safetensors"
        checksums, failure = {}, None
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            if offsets:
                where = json.dumps({name: {"saved_offsets": offset} for name, offset in offsets.items()})
                save_file({name: self._copies[name] for name in offsets}, part, {"DCP_SHARDING_INFO": where})
                flush(part)
                checksums[part.name] = sha256(part)
        except (OSError, SafetensorError) as error:
            failure = str(error)
        parts = gather((checksums, failure), self._group)
        if rank() != 0:
            return
        try:
            for number, (theirs, reason) in enumerate(parts):
                if reason is not None:
                    raise OSError(f"{reason} (rank {number})" if len(parts) > 1 else reason)
                checksums |= theirs
            self._publish(step, scratch, checksums, progress)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            self.failed += 1
            newest = max(self.steps(), default=None)
            kept = "there is none before it" if newest is None else f"the newest is that of step {newest}"
            warnings.warn(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; "
                f"training goes on, {kept}",
                stacklevel=1,
            )

    def _publish(self, step: int, scratch: Path, checksums: dict[str, str], progress: dict[str, Any]) -> None:
        write_json(scratch / PROGRESS, progress)
        seal(scratch, {**checksums, PROGRESS: sha256(scratch / PROGRESS)})
        for later in self.steps():
            if later >= step:  # damaged and passed over by `load`, or the run would be further on
                shutil.rmtree(self._path(later))
        scratch.rename(self._path(step))
        flush(self.folder)
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self._path(old))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its first name. They come from state_dict, which makes FSDP shard them again where the
    last forward pass, of an evaluation, has left them gathered."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        names.setdefault(parameter, name)
    return {name: parameter for parameter, name in names.items()}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: `model.NAME` and, for each kind of moment, `optimizer.KIND.NAME`."""
    state: dict[str, Tensor] = {}
    moments = {} if optimizer is None else optimizer.state
    for name, parameter in _parameters(model).items():
        state[f"model.{name}"] = parameter.detach()
        for kind, value in moments.get(parameter, {}).items():
            state[f"optimizer.{kind}.{name}"] = value
    return state


def _restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata()
    if optimizer is not None:
        parameters = _parameters(model)
        for key, stored in metadata.state_dict_metadata.items():
            if key.startswith("optimizer."):
                _, kind, name = key.split(".", 2)
                optimizer.state[parameters[name]][kind] = _empty_moment(parameters[name], stored, optimizer)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(_state(model, optimizer), metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _empty_moment(parameter: nn.Parameter, stored: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """Sharded as its parameter. AdamW's count of steps is a scalar, on the device only when fused."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(stored.size, dtype=dtype, device=parameter.device if optimizer.defaults.get("fused") else "cpu")
