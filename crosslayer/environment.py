"""Where this runs: the machine and the versions, for every JSON file of results, and how many processes there are."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from crosslayer.errors import UserError
from crosslayer.version import __version__


def describe_environment() -> dict[str, Any]:
    """Machine, processor or GPU, versions, and the time (UTC)."""
    import torch

    return {
        "crosslayer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def started_processes() -> int:
    """How many processes torchrun, or another launcher, has started to work together; 1 without one.

    Raises:
        UserError: WORLD_SIZE, where they say so, is no such number.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"WORLD_SIZE={count!r} in the environment is no number of processes; unset it, or use torchrun")
    return int(count)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
