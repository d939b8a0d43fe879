"""The Transformer in plain PyTorch, and the cache that serves it."""

from crosslayer.model.cache import ContiguousCache
from crosslayer.model.transformer import Transformer

__all__ = ["ContiguousCache", "Transformer"]
