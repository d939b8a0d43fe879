"""crosslayer: Transformers whose layers share their key/value cache.

`SharingPlan` and `ModelConfig` are available at once; `Transformer`, `load` and `save` import torch when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crosslayer.plan import ModelConfig, SharingPlan
from crosslayer.version import __version__

if TYPE_CHECKING:
    from crosslayer.checkpoint import load, save
    from crosslayer.model import Transformer

__all__ = ["ModelConfig", "SharingPlan", "Transformer", "__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in ("load", "save"):
        from crosslayer import checkpoint

        return getattr(checkpoint, name)
    if name == "Transformer":
        from crosslayer.model import Transformer

        return Transformer
    raise AttributeError(f"module 'crosslayer' has no attribute {name!r}")
