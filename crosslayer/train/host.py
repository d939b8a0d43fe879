"""The machine under a run: which device and precision, and how to keep a CPU from wasting its time."""

from __future__ import annotations

import ctypes
import platform

import torch

from crosslayer.errors import UserError


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that a config names; auto is CUDA where there is one. Of several processes on a machine, the one with
    `local_rank` gets the device of that number. A GPU with a number becomes the current one, on which Triton launches.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if local_rank is not None and device.type != "cpu":
            if device.index is not None:
                raise UserError(f"device {name!r} is one for all processes; want auto, cpu or {device.type}")
            device = torch.device(device.type, local_rank)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        where = "here" if local_rank is None else f"by process {local_rank} of this machine"
        raise UserError(f"device {name!r} cannot be used {where}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context to run a model in: bf16 autocast, or nothing for fp32. `precision` auto is bf16 on CUDA only."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, precision))


def uses_bf16(device: torch.device, precision: str) -> bool:
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def _keep_freed_memory() -> None:
    # glibc returns large blocks to the system as soon as they are freed, and every step faults them in again: that
    # took a quarter of the time of a small model's step.
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
