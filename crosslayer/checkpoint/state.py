"""Training state: everything needed to go on from a step as if nothing had happened.

A checkpoint is a folder `step-00001000` with the weights and the optimizer's moments as safetensors and the rest as
JSON. Data order is a function of (seed, step), so no sampler or generator state is kept.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crosslayer.checkpoint.files import CHECKSUMS, check_folder, new_folder
from crosslayer.errors import UserError
from crosslayer.files import read_json, write_json

KEPT = 2


def save_state(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write `folder/step-…` in one step, then drop all but the newest two. `progress` is any JSON."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    unique = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    target = folder / f"step-{step:08d}"
    for stale in folder.glob(".step-*"):  # half-written when the process was killed
        shutil.rmtree(stale)
    for damaged in _checkpoints(folder):  # passed over by load_state, or the run would be further on
        if damaged.name >= target.name:
            shutil.rmtree(damaged)
    with new_folder(target, "state.json") as scratch:
        save_file(unique, scratch / "state.safetensors")
        write_json(scratch / "state.json", {"step": step, **progress})
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest whole checkpoint into `model` and `optimizer`; return its progress, or None without one.

    A damaged checkpoint is passed over, with a warning, for the one before it.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        try:
            read_json(checkpoint / CHECKSUMS)
            check_folder(checkpoint)
            progress = read_json(checkpoint / "state.json")
        except UserError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
            continue
        _restore(load_file(checkpoint / "state.safetensors"), model, optimizer)
        return progress
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _restore(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    model.load_state_dict(weights)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, key, parameter_name = name.split(".", 2)
            moments.setdefault(parameter_name, {})[key] = tensor
    for name, parameter in model.named_parameters():
        for key, value in moments.get(name, {}).items():
            # AdamW keeps its step count as a scalar tensor, on the device only when fused.
            device = parameter.device if value.ndim or optimizer.defaults.get("fused") else "cpu"
            optimizer.state[parameter][key] = value.to(device)
