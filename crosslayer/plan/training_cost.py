"""What training costs a GPU, computed from a model's config alone: memory, and the FLOPs of its matmuls.

The memory is that of the path that runs on CUDA: compiled blocks in bf16, weights, gradients and AdamW's two moments
in fp32, and the loss fused with the output projection. It counts what PyTorch allocates; CUDA's own context and what
fragmentation leaves unused come on top. Tests compare it with what compiled blocks keep, and with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from crosslayer.plan.config import ModelConfig
from crosslayer.plan.cost import forward_flops_per_token, training_flops_per_token

BF16, FP32 = 2, 4
# Logits made at a time, and the tokens that they are rounded down to: those of model.loss on a GPU.
LOGITS_AT_A_TIME, TOKENS_TILE = 2**30, 1024

Recompute = Literal["none", "block", "group"]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU.

    `weights`, `gradients` and `optimizer` are its fp32 shards; `compute_weights` is what it holds of the weights in
    bf16, `activations` what a micro batch leaves for its backward pass, `loss` the logits and what goes with them.
    `peak` is the most at one time. It is less than the sum where a step has one micro batch: then there are no
    gradients yet when the logits exist.
    """

    weights: int
    gradients: int
    optimizer: int
    compute_weights: int
    activations: int
    loss: int
    peak: int


def training_memory(
    config: ModelConfig,
    *,
    micro_batch_tokens: int,
    micro_batches: int,
    recompute: Recompute = "none",
    data_parallel: int = 1,
    tensor_parallel: int = 1,
) -> TrainingMemory:
    """The memory of one GPU of data_parallel * tensor_parallel of them that takes `micro_batches` through the model
    for each step, of `micro_batch_tokens` tokens each.

    FSDP2 cuts what tensor parallelism leaves to a GPU into `data_parallel` even parts, and gathers two layers at a
    time in bf16 (the one at work and the next), the embedding and the output projection throughout. Gradients that
    wait for later micro batches are not cut: they are reduced once a step.
    """
    whole = FP32 * parameters_per_rank(config, tensor_parallel)
    shard = -(-whole // data_parallel)
    gradients = whole if micro_batches > 1 else shard
    compute_weights = _compute_weights(config, recompute, data_parallel, tensor_parallel)
    activations = activation_bytes(config, micro_batch_tokens, recompute, tensor_parallel)
    loss = _loss_bytes(config, micro_batch_tokens, tensor_parallel)
    # The backward pass frees activations as it makes gradients, so most is in use where it starts or where it ends.
    layer = micro_batch_tokens * _backward_bytes_per_token(config, recompute, tensor_parallel)
    start = (gradients if micro_batches > 1 else 0) + activations + max(loss, layer)
    end = gradients + layer
    return TrainingMemory(
        weights=shard,
        gradients=gradients,
        optimizer=2 * shard,
        compute_weights=compute_weights,
        activations=activations,
        loss=loss,
        peak=3 * shard + compute_weights + max(start, end),
    )


def parameters_per_rank(config: ModelConfig, tensor_parallel: int = 1) -> int:
    """Parameters that one of `tensor_parallel` ranks holds, before FSDP2 cuts them.

    Each rank has its share of the query heads, of the feed-forward width and of the vocabulary. Keys and values are
    split by head where their heads can be shared out evenly; else, as for the single head of MQA, every rank has their
    whole projection. Norms, and the bias of the output projection, are on every rank.
    """
    plan, hidden = config.plan, config.hidden_size
    query, kv, _ = _widths(config, tensor_parallel)
    layers = plan.num_layers
    owned = len(plan.key_owners) + len(plan.value_owners)
    total = sum(_layer_weights(config, layer, tensor_parallel) for layer in range(layers))
    total += (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden // tensor_parallel
    total += hidden * (2 * layers + 1 + sum(config.has_kv_norm(layer) for layer in range(layers)))
    if config.attention_bias:
        total += layers * query + owned * kv
    if config.attention_output_bias:
        total += layers * hidden
    if config.qk_norm:
        total += (layers + len(plan.key_owners)) * config.head_dim
    return total


def activation_bytes(config: ModelConfig, tokens: int, recompute: Recompute = "none", tensor_parallel: int = 1) -> int:
    """Bytes that `tokens` tokens keep until the backward pass, on one tensor-parallel rank.

    With recomputation by block: the input of each block, and the keys and values that others read. By group: the input
    of each group. Always: token ids (int64), and around the loss the fp32 residual stream, its norm (fp32, and one
    number a token), and the loss's gradient by it (bf16).
    """
    plan, hidden = config.plan, config.hidden_size
    per_token = 8 + (2 * FP32 + BF16) * hidden + FP32
    if recompute == "none":
        per_token += sum(_layer_bytes_per_token(config, layer, tensor_parallel) for layer in range(plan.num_layers))
    elif recompute == "group":
        per_token += BF16 * hidden * len(plan.layer_groups)
    else:
        per_token += BF16 * hidden * plan.num_layers
        for slot in plan.slots:
            if len(slot.readers) > 1:
                _, kv, _ = _widths(config, tensor_parallel)
                # Values are a view of what _value_bytes_per_token counts; keys were copied when they were rotated.
                per_token += (
                    BF16 * kv if slot.kind == "key" else _value_bytes_per_token(config, slot.owner, tensor_parallel)
                )
    return tokens * per_token


def executed_flops_per_token(config: ModelConfig, context: int, recompute: Recompute = "none") -> int:
    """FLOPs of matmuls that the GPUs do for each token: those of training, and the forward pass of the layers once more
    where it is recomputed."""
    flops = training_flops_per_token(config, context)
    if recompute != "none":
        flops += forward_flops_per_token(config, context) - 2 * config.vocab_size * config.hidden_size
    return flops


def _widths(config: ModelConfig, tensor_parallel: int) -> tuple[int, int, int]:
    """One rank's width of the queries, of a layer's keys or values, and of the feed-forward layer."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads % tensor_parallel == 0:
        kv_heads //= tensor_parallel
    return (
        heads * config.head_dim // tensor_parallel,
        kv_heads * config.head_dim,
        config.intermediate_size // tensor_parallel,
    )


def _layer_weights(config: ModelConfig, layer: int, tensor_parallel: int) -> int:
    """Weights of one layer's matrices."""
    query, kv, feed_forward = _widths(config, tensor_parallel)
    owned = config.plan.owns_keys(layer) + config.plan.owns_values(layer)
    return config.hidden_size * (2 * query + owned * kv + 3 * feed_forward)


def _units(config: ModelConfig, recompute: Recompute) -> Sequence[Sequence[int]]:
    """The layers whose activations exist at the same time, together: all, or those of which one is recomputed."""
    layers = range(config.num_hidden_layers)
    return {"none": [layers], "block": [[layer] for layer in layers], "group": config.plan.layer_groups}[recompute]


def _compute_weights(config: ModelConfig, recompute: Recompute, data_parallel: int, tensor_parallel: int) -> int:
    vocabulary = config.vocab_size * config.hidden_size // tensor_parallel
    layers = [_layer_weights(config, layer, tensor_parallel) for layer in range(config.num_hidden_layers)]
    if data_parallel > 1:
        return BF16 * (2 * max(layers) + (1 if config.tie_word_embeddings else 2) * vocabulary)
    # Autocast's copies, which a layer keeps for its backward pass.
    return BF16 * (max(sum(layers[layer] for layer in unit) for unit in _units(config, recompute)) + vocabulary)


def _loss_bytes(config: ModelConfig, tokens: int, tensor_parallel: int) -> int:
    """The fused loss (model.loss): the hidden states in bf16, the projection's fp32 gradient, and of the chunk at work
    the logits and their gradient in bf16, next to the gradient of the chunk before."""
    vocabulary = config.vocab_size // tensor_parallel
    chunk = max(1, LOGITS_AT_A_TIME // vocabulary // TOKENS_TILE) * TOKENS_TILE
    second = min(chunk, max(0, tokens - chunk))
    rows = max(2 * min(chunk, tokens), chunk + 2 * second if second else 0)
    return BF16 * rows * vocabulary + (BF16 * tokens + FP32 * vocabulary) * config.hidden_size


def _backward_bytes_per_token(config: ModelConfig, recompute: Recompute, tensor_parallel: int) -> int:
    """What the backward pass adds per token: the layers that it recomputes, and the gradients inside one layer (of
    gate, up, their product, and three of the width of the residual stream)."""
    _, _, feed_forward = _widths(config, tensor_parallel)
    gradients = BF16 * 3 * (feed_forward + config.hidden_size)
    if recompute == "none":
        return gradients
    return gradients + max(
        sum(_layer_bytes_per_token(config, layer, tensor_parallel) for layer in unit)
        for unit in _units(config, recompute)
    )


def _layer_bytes_per_token(config: ModelConfig, layer: int, tensor_parallel: int) -> int:
    """What a compiled layer keeps of each token."""
    plan = config.plan
    query, kv, feed_forward = _widths(config, tensor_parallel)
    norms = 2 + config.has_kv_norm(layer)
    # The layer's input and each norm's output, 1 / rms of each norm, and the output of attention's last projection.
    kept = BF16 * config.hidden_size * (2 + norms) + FP32 * norms
    # Rotated queries, attention's output and log-sum-exp; gate, up and their product.
    kept += BF16 * 2 * query + FP32 * config.num_attention_heads // tensor_parallel + BF16 * 3 * feed_forward
    if plan.owns_keys(layer):
        kept += BF16 * kv  # rotated
    if config.qk_norm:  # what each head's norm starts from, and its 1 / rms
        kept += FP32 * (query + plan.owns_keys(layer) * kv) // config.head_dim
        kept += BF16 * sum(_projections(config, layer, tensor_parallel))
    elif plan.owns_values(layer):
        kept += _value_bytes_per_token(config, layer, tensor_parallel)
    return kept


def _projections(config: ModelConfig, layer: int, tensor_parallel: int) -> list[int]:
    """Widths of the matmuls that make a layer's queries, keys and values; the last one makes the values."""
    query, kv, _ = _widths(config, tensor_parallel)
    own = kv * (config.plan.owns_keys(layer) + config.plan.owns_values(layer))
    return [query, own] if config.has_kv_norm(layer) else [query + own]


def _value_bytes_per_token(config: ModelConfig, layer: int, tensor_parallel: int) -> int:
    """Values are a view of the output of the matmul that makes them, and keep all of it."""
    return BF16 * _projections(config, layer, tensor_parallel)[-1]
