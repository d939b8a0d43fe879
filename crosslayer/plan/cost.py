"""What a model costs, computed from its config alone: cache bytes, parameters, FLOPs, and what fits in a memory.

Every figure is an exact whole number. Bytes are those of the keys and values themselves; the scales that an fp8 or
int8 cache keeps next to them depend on the kernel and are not counted.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from crosslayer.errors import UserError
from crosslayer.plan.config import ModelConfig
from crosslayer.plan.sharing import PASSES, PASSES_WITH_GRADIENT, SharingPlan

BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}

# What the backward pass recomputes instead of keeping: nothing, each layer, or each group of layers that share.
Recompute = Literal["none", "block", "group"]


def kv_bytes_per_token(config: ModelConfig, cache_dtype: str = "bf16", *, past_windows: bool = False) -> int:
    """Bytes that one token adds to the cache: bytes per element * KV heads * head_dim, summed over the slots.

    With `past_windows`, only the slots that still grow once the context is longer than every window.
    """
    slots = [slot for slot in config.plan.slots if not past_windows or slot.window is None]
    return len(slots) * _slot_bytes_per_token(config, cache_dtype)


def kv_bytes(config: ModelConfig, context: int, batch: int = 1, cache_dtype: str = "bf16") -> int:
    """Bytes of the cache of `batch` sequences of `context` tokens; a windowed slot stops growing at its window."""
    tokens = sum(slot.capacity(context) for slot in config.plan.slots)
    return batch * tokens * _slot_bytes_per_token(config, cache_dtype)


def _slot_bytes_per_token(config: ModelConfig, cache_dtype: str) -> int:
    if cache_dtype not in BYTES_PER_ELEMENT:
        raise UserError(f"cache dtype {cache_dtype!r} is not known; choose from {', '.join(BYTES_PER_ELEMENT)}")
    return BYTES_PER_ELEMENT[cache_dtype] * config.num_key_value_heads * config.head_dim


def rank_widths(config: ModelConfig, tensor_parallel: int = 1) -> tuple[int, int, int]:
    """The width of a layer's queries, of its keys (or values), and of its feed-forward part, on one of
    `tensor_parallel` ranks.

    A rank has its share of the query heads and of the feed-forward part. Keys and values are divided by head where the
    ranks divide the KV heads; else, as with the single head of MQA, every rank has their whole projections.
    """
    kv_heads = config.num_key_value_heads
    return (
        config.num_attention_heads // tensor_parallel * config.head_dim,
        (kv_heads if kv_heads % tensor_parallel else kv_heads // tensor_parallel) * config.head_dim,
        config.intermediate_size // tensor_parallel,
    )


def num_parameters(config: ModelConfig, tensor_parallel: int = 1) -> int:
    """Parameters of the model: tied embeddings count once, a layer without keys or values has no such projection.

    With `tensor_parallel`, those that one of so many ranks holds: its share of the vocabulary and of the matrices (see
    `rank_widths`), and all norms and biases of attention's output.
    """
    plan, hidden = config.plan, config.hidden_size
    query_width, kv_width, _ = rank_widths(config, tensor_parallel)
    projections = len(plan.key_owners) + len(plan.value_owners)  # of width kv_width
    total = sum(layer_weights(config, layer, tensor_parallel) for layer in range(plan.num_layers))
    embeddings = 1 if config.tie_word_embeddings else 2
    total += embeddings * config.vocab_size * hidden // tensor_parallel
    total += hidden * (2 * plan.num_layers + 1)  # the two norms of each layer, and the last one
    total += hidden * sum(config.has_kv_norm(layer) for layer in range(plan.num_layers))
    if config.attention_bias:
        total += plan.num_layers * query_width + projections * kv_width
    if config.attention_output_bias:
        total += plan.num_layers * hidden
    if config.qk_norm:
        total += (plan.num_layers + len(plan.key_owners)) * config.head_dim
    return total


def layer_weights(config: ModelConfig, layer: int, tensor_parallel: int = 1) -> int:
    """Weights of a layer's matrices, on one of `tensor_parallel` ranks."""
    query_width, kv_width, feed_forward = rank_widths(config, tensor_parallel)
    projections = config.plan.owns_keys(layer) + config.plan.owns_values(layer)
    return config.hidden_size * (2 * query_width + projections * kv_width + 3 * feed_forward)


def forward_flops_per_token(config: ModelConfig, context: int, passes: int = PASSES + PASSES_WITH_GRADIENT) -> int:
    """FLOPs of a forward pass over `context` tokens, per token, to the nearest whole number; layers that need several
    passes run `passes` times.

    Two for each weight of each matrix product (the lm_head at every token), and in each layer 4 * H * D for each key
    that a token attends to: causal, so (context + 1) / 2 keys on average, fewer in a windowed layer. Norms, RoPE,
    softmax and activations are left out, as is usual. Sharing saves K/V projections here and no attention.
    """
    plan = config.plan
    layers = plan.layers_run(passes)
    weights = config.vocab_size * config.hidden_size + sum(layer_weights(config, layer) for layer in layers)
    attended = sum(_attended_keys(plan, layer, context) for layer in layers)
    return round(2 * weights + Fraction(4 * config.num_attention_heads * config.head_dim * attended, context))


def _attended_keys(plan: SharingPlan, layer: int, context: int) -> int:
    """Keys that the queries of a sequence attend to in a layer, added up over its `context` positions."""
    if layer in plan.readers_below_owner:  # to those before its own only
        return context * (context - 1) // 2
    window = min(plan.windows[layer] or context, context)
    return window * (window + 1) // 2 + (context - window) * window


def training_flops_per_token(config: ModelConfig, context: int) -> int:
    """Of forward and backward pass, which does two products for each one that has gradients: three forward passes'
    worth, unless layers need several passes, of which most have none."""
    with_gradients = forward_flops_per_token(config, context, PASSES_WITH_GRADIENT)
    return forward_flops_per_token(config, context) + 2 * with_gradients


def recomputed_flops_per_token(config: ModelConfig, context: int, recompute: Recompute) -> int:
    """What activation checkpointing adds to training: the forward pass of all layers once more, without the lm_head.
    With `recompute` group, passes without gradients are among what is repeated."""
    if recompute == "none":
        return 0
    passes = PASSES_WITH_GRADIENT + (PASSES if recompute == "group" else 0)
    return forward_flops_per_token(config, context, passes) - 2 * config.vocab_size * config.hidden_size


def largest_batch(
    config: ModelConfig, context: int, memory: int, cache_dtype: str = "bf16", weight_dtype: str = "bf16"
) -> int:
    """Sequences of `context` tokens whose cache fits in `memory` bytes next to the weights; activations not counted."""
    free = memory - _weight_bytes(config, weight_dtype)
    return max(0, free // kv_bytes(config, context, 1, cache_dtype))


def longest_context(
    config: ModelConfig, batch: int, memory: int, cache_dtype: str = "bf16", weight_dtype: str = "bf16"
) -> int | None:
    """Tokens that each of `batch` sequences can have in `memory` bytes next to the weights; activations not counted.

    None when there is no limit: every slot is windowed and the full windows fit.
    """
    free = memory - _weight_bytes(config, weight_dtype)

    def needed(context: int) -> int:
        return kv_bytes(config, context, batch, cache_dtype)

    widest = max(slot.window or 0 for slot in config.plan.slots)
    if needed(widest) > free:
        return max(0, bisect_right(range(widest + 1), free, key=needed) - 1)
    growth = batch * kv_bytes_per_token(config, cache_dtype, past_windows=True)
    return widest + (free - needed(widest)) // growth if growth else None


def _weight_bytes(config: ModelConfig, dtype: str) -> int:
    return num_parameters(config) * BYTES_PER_ELEMENT[dtype]


@dataclass(frozen=True)
class Cost:
    """Every figure of one model, for one workload: `context`, `batch`, a cache dtype and a device memory in bytes."""

    kv_bytes_per_token: int
    kv_bytes_per_token_past_windows: int
    num_kv_layers: int
    parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int
    kv_bytes: int
    largest_batch: int
    longest_context: int | None

    @classmethod
    def of(cls, config: ModelConfig, *, context: int, batch: int, memory: int, cache_dtype: str = "bf16") -> Cost:
        return cls(
            kv_bytes_per_token=kv_bytes_per_token(config, cache_dtype),
            kv_bytes_per_token_past_windows=kv_bytes_per_token(config, cache_dtype, past_windows=True),
            num_kv_layers=len(config.plan.owners),
            parameters=num_parameters(config),
            forward_flops_per_token=forward_flops_per_token(config, context),
            training_flops_per_token=training_flops_per_token(config, context),
            kv_bytes=kv_bytes(config, context, batch, cache_dtype),
            largest_batch=largest_batch(config, context, memory, cache_dtype),
            longest_context=longest_context(config, batch, memory, cache_dtype),
        )
