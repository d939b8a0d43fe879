"""The engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from crosslayer.errors import UserError

CacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class EngineConfig:
    """How the engine divides memory and time.

    `cache_bytes`: for keys and values (None: 85% of the GPU memory that the model leaves free, less the logits of all
    CUDA graphs, or on a CPU 1 GiB or what a sequence of `max_length` tokens needs; never more than `max_running` such
    sequences need).
    `block_size`: tokens per block.
    `max_length`: tokens of a sequence, prompt and continuation (None: the model's context).
    `max_running`: sequences that are in the cache at a time.
    `max_step_tokens`: tokens that go through the model in one step, prompts in chunks if need be (None: 8192 on a GPU,
    2048 elsewhere).
    `prefix_caching`: sequences use the blocks of others that begin alike.
    `cache_dtype`: keys and values are stored in the model's precision ("auto") or in 8 bits ("fp8"; see
    `crosslayer.model.fp8`).

    Raises:
        UserError: a number that is not positive, or an unknown dtype.
    """

    cache_bytes: int | None = None
    block_size: int = 32
    max_length: int | None = None
    max_running: int = 256
    max_step_tokens: int | None = None
    prefix_caching: bool = True
    cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        for name in ("cache_bytes", "block_size", "max_length", "max_running", "max_step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be positive, got {value}")
        if self.cache_dtype not in get_args(CacheDtype):
            raise UserError(f"cache_dtype must be one of {', '.join(get_args(CacheDtype))}, got {self.cache_dtype!r}")
