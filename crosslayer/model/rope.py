"""Rotary position embeddings and the ways that configs stretch them to longer contexts.

The cosines and sines are computed once per forward pass, in float32, from the positions; nothing is stored in the
model, so casting it to bfloat16 costs no precision here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crosslayer.plan import ModelConfig, RopeScaling


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, T, 1, D/2], for integer positions [B, T]."""
    frequencies, amplitude = _frequencies(config, positions.device)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, heads, D] by the tables of `rope_tables`, pairing component i with i + D/2 as Llama does."""
    first, second = x.chunk(2, dim=-1)  # the float32 tables lift bfloat16 to float32
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position for each of the D/2 pairs, and the factor on cos and sin.

    The order of operations is that of transformers, in which most checkpoints are made: at position 100 000 a
    frequency that differs in its last bit alone turns a pair by 0.005 more.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, config, scaling)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow waves are divided by the factor, fast ones kept, those between blended by how often they turn."""
    assert scaling.original_max_position_embeddings is not None  # checked by RopeScaling
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(plain: Tensor, config: ModelConfig, scaling: RopeScaling) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow waves, keep fast ones, and sharpen attention."""
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair index whose wave turns this often over the original context."""
        return config.head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, device=plain.device, dtype=torch.float32)
    keep = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    amplitude = scaling.attention_factor
    if amplitude is None:
        if scaling.mscale and scaling.mscale_all_dim:
            amplitude = sharpening(scaling.mscale) / sharpening(scaling.mscale_all_dim)
        else:
            amplitude = sharpening(1.0)
    return plain / scaling.factor * (1 - keep) + plain * keep, amplitude
