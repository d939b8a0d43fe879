"""Memory that training takes on a GPU, computed from a model's config alone.

It is that of the path that runs on CUDA: compiled blocks in bf16, weights, gradients and AdamW's two moments in fp32,
and the loss fused with the output projection. It counts what PyTorch allocates; CUDA's own context and what
fragmentation leaves unused come on top. Tests compare it with what compiled blocks keep, and with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosslayer.errors import UserError
from crosslayer.plan.config import ModelConfig
from crosslayer.plan.cost import Recompute, layer_weights, num_parameters, rank_widths
from crosslayer.plan.sharing import PASSES_WITH_GRADIENT

BF16, FP32, INT64 = 2, 4, 8
# Logits that model.loss makes at a time on a GPU, in whole tiles of so many tokens.
LOGITS_AT_A_TIME, TILE = 2**30, 1024


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU.

    `weights`, `gradients` and `optimizer` are fp32, and what FSDP2 leaves to one GPU. `compute_weights` are weights in
    bf16, copied by autocast or gathered by FSDP2. `activations` is what a micro batch keeps for its backward pass, and
    `loss` what exists only between the passes: mostly logits. `peak` is the most at one time. It is less than the sum
    where a step has one micro batch, as there are no gradients yet when there are logits; recomputed layers can make
    it more.
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
    tokens: int,
    micro_batches: int,
    recompute: Recompute = "none",
    data_parallel: int = 1,
    tensor_parallel: int = 1,
) -> TrainingMemory:
    """The memory of each of data_parallel * tensor_parallel GPUs, through which `micro_batches` of `tokens` tokens go
    for a step.

    On several GPUs FSDP2 cuts what tensor parallelism leaves to a GPU into `data_parallel` even parts. Gradients that
    wait for a later micro batch are whole: they are reduced once a step.

    Raises:
        UserError: the model cannot be divided among so many tensor-parallel ranks.
    """
    check_tensor_parallel(config, tensor_parallel)
    whole = FP32 * num_parameters(config, tensor_parallel)
    shard = -(-whole // data_parallel)
    gradients = whole if micro_batches > 1 else shard
    sharded = data_parallel * tensor_parallel > 1
    compute_weights = BF16 * _compute_weights(config, recompute, tensor_parallel, sharded)
    activations = tokens * activation_bytes_per_token(config, recompute, tensor_parallel)
    loss = _loss_bytes(config, tokens, tensor_parallel)
    # The backward pass frees activations as it makes gradients, so most is in use where it starts or where it ends.
    backward = tokens * _backward_bytes_per_token(config, recompute, tensor_parallel)
    start = (gradients if micro_batches > 1 else 0) + activations + max(loss, backward)
    end = gradients + backward
    return TrainingMemory(
        weights=shard,
        gradients=gradients,
        optimizer=2 * shard,
        compute_weights=compute_weights,
        activations=activations,
        loss=loss,
        peak=3 * shard + compute_weights + max(start, end),
    )


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of a checkpoint: weights and AdamW's two moments, in fp32."""
    return 3 * FP32 * num_parameters(config)


def check_tensor_parallel(config: ModelConfig, ranks: int) -> None:
    """Whether the heads, features and vocabulary of a model can be shared out among so many tensor-parallel ranks.

    Raises:
        UserError: they cannot; the message names the field.
    """
    for name in ("num_attention_heads", "intermediate_size", "vocab_size"):
        if (size := getattr(config, name)) % ranks:
            hint = f"; model.vocab_size={-(-size // ranks) * ranks} pads it" if name == "vocab_size" else ""
            raise UserError(f"train.tensor_parallel {ranks} must divide {name} {size}{hint}")
    heads = config.num_key_value_heads
    if heads % ranks and ranks % heads:
        raise UserError(
            f"train.tensor_parallel {ranks} must divide num_key_value_heads {heads}, or be a multiple of it: "
            "a rank holds whole KV heads, or the one that all its query heads use"
        )


def activation_bytes_per_token(config: ModelConfig, recompute: Recompute, tensor_parallel: int = 1) -> int:
    """Bytes that a token keeps on a rank between the forward and the backward pass.

    With `recompute` block, of each layer only its input, and the keys and values that other layers read; with group,
    the input of each group of layers. Always: the token id, and of the end of the model the residual stream and its
    norm in fp32, and the gradient that the fused loss has worked out already.
    """
    plan, hidden = config.plan, config.hidden_size
    end = INT64 + (2 * FP32 + BF16) * hidden + FP32
    if recompute == "none":
        layers = plan.layers_run(PASSES_WITH_GRADIENT)
        return end + sum(_layer_bytes(config, layer, tensor_parallel) for layer in layers)
    if recompute == "group":
        return end + BF16 * hidden * len(plan.layer_groups)
    _, kv, _ = rank_widths(config, tensor_parallel)
    shared = sum(kv for slot in plan.slots if len(slot.readers) > 1)
    return end + BF16 * (hidden * plan.num_layers + shared)


def _projections(config: ModelConfig, layer: int, tensor_parallel: int) -> list[list[int]]:
    """The matmuls that make a layer's queries, keys and values, each as the widths of what it makes; the last one makes
    the values, where the layer owns any.

    Compiled, projections of one input are one matmul, unless tensor parallelism keeps them apart.
    """
    query, kv, _ = rank_widths(config, tensor_parallel)
    own = [kv] * (config.plan.owns_keys(layer) + config.plan.owns_values(layer))
    if tensor_parallel > 1:
        return [[query], *([width] for width in own)]
    return [[query], own] if config.has_kv_norm(layer) else [[query, *own]]


def _layer_bytes(config: ModelConfig, layer: int, tensor_parallel: int) -> int:
    """What a compiled layer keeps of each token.

    Matmuls keep their inputs, so all but the sums of the residual stream is there; queries and keys are rotated copies,
    values copies too. Queries and keys that a norm has to see again hold on to all that their matmul made.
    """
    plan = config.plan
    query, kv, feed_forward = rank_widths(config, tensor_parallel)
    # The layer's input, each norm's output, and what attention adds to the residual stream.
    kept = BF16 * config.hidden_size * (4 + config.has_kv_norm(layer))
    # Rotated queries, the output of attention; gate, up and their product.
    kept += BF16 * (2 * query + 3 * feed_forward)
    # 1 / rms of the two places that are normalised, log-sum-exp of each head.
    kept += FP32 * (2 + query // config.head_dim)
    keys, values = (kv if owns else 0 for owns in (plan.owns_keys(layer), plan.owns_values(layer)))
    kept += BF16 * (keys + values)
    if config.qk_norm:
        made = sum(map(sum, _projections(config, layer, tensor_parallel)))
        kept += BF16 * made + FP32 * (query + keys) // config.head_dim
    return kept


def _recomputed_units(config: ModelConfig, recompute: Recompute) -> Sequence[Sequence[int]]:
    """Layers that are recomputed together, and so exist at the same time; all of them where nothing is recomputed."""
    layers = range(config.num_hidden_layers)
    if recompute == "group":
        return config.plan.layer_groups
    return [layers] if recompute == "none" else [[layer] for layer in layers]


def _backward_bytes_per_token(config: ModelConfig, recompute: Recompute, tensor_parallel: int) -> int:
    """What the backward pass adds: the layers that it recomputes, and the gradients inside one feed-forward part (of
    gate, up, their product, and three as wide as the residual stream)."""
    _, _, feed_forward = rank_widths(config, tensor_parallel)
    gradients = 3 * BF16 * (feed_forward + config.hidden_size)
    if recompute == "none":
        return gradients
    units = _recomputed_units(config, recompute)
    return gradients + max(sum(_layer_bytes(config, layer, tensor_parallel) for layer in unit) for unit in units)


def _compute_weights(config: ModelConfig, recompute: Recompute, tensor_parallel: int, sharded: bool) -> int:
    """Weights that exist in bf16 at the same time.

    On one GPU autocast makes copies, and a compiled layer keeps its own for the backward pass; the output projection's
    is short-lived. FSDP2 gathers the vocabulary's matrices throughout, and two layers at a time: the one at work and
    the next. But weights that were laid side by side for one matmul are copies again, which a layer keeps.
    """
    vocabulary = config.vocab_size * config.hidden_size // tensor_parallel
    layers = range(config.num_hidden_layers)
    weights = [layer_weights(config, layer, tensor_parallel) for layer in layers]
    kept = [_joined_weights(config, layer, tensor_parallel) for layer in layers] if sharded else weights
    total = max(sum(kept[layer] for layer in unit) for unit in _recomputed_units(config, recompute))
    if sharded:
        return total + 2 * max(weights) + (1 if config.tie_word_embeddings else 2) * vocabulary
    return total + vocabulary


def _joined_weights(config: ModelConfig, layer: int, tensor_parallel: int) -> int:
    """Weights of a layer that compiled code lays side by side."""
    _, _, feed_forward = rank_widths(config, tensor_parallel)
    joined = [sum(widths) for widths in _projections(config, layer, tensor_parallel) if len(widths) > 1]
    return config.hidden_size * (sum(joined) + (2 * feed_forward if tensor_parallel == 1 else 0))


def _loss_bytes(config: ModelConfig, tokens: int, tensor_parallel: int) -> int:
    """The fused loss: hidden states in bf16, the fp32 gradient of the output projection, and the logits of the chunk at
    work in bf16, which their gradient overwrites."""
    vocabulary = config.vocab_size // tensor_parallel
    chunk = max(1, LOGITS_AT_A_TIME // vocabulary // TILE) * TILE
    return BF16 * min(chunk, tokens) * vocabulary + (BF16 * tokens + FP32 * vocabulary) * config.hidden_size
