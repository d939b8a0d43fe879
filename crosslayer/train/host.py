"""The machine under a run: which device and precision, and how to keep a CPU from wasting its time."""

from __future__ import annotations

import ctypes
import platform

import torch

from crosslayer.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that a config names; auto is CUDA where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context to run a model in: bf16 autocast, or nothing for fp32. `precision` auto is bf16 on CUDA only."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def _keep_freed_memory() -> None:
    # glibc returns large blocks to the system as soon as they are freed, and every step faults them in again: that
    # took a quarter of the time of a small model's step.
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
