"""The equivalences that a correct model satisfies, each a function that raises AssertionError where one fails.

The tests run them on every design; the mutation tests run them on broken implementations to show that they notice.
All compare within `TOLERANCE` of the largest expected value, in float32 unless they say otherwise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from crosslayer.model import ContiguousCache, Transformer
from crosslayer.plan import ModelConfig
from tests.model.reference import reference_logits, reference_loss

TOLERANCE = 1e-5
LOG = logging.getLogger("difference")  # `pytest --log-cli-level=info` shows every difference found


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with every parameter random, gains and biases included, and activations of order one.

    Freshly initialised models attend almost evenly and have gains of one: they would hide a wrong key or norm.
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise if "embed_tokens" in name else noise / parameter.shape[1] ** 0.5)
    return model


def random_tokens(model: Transformer, rows: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(device(model))


def device(model: Transformer) -> torch.device:
    return model.lm_head.weight.device


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, want {tuple(expected.shape)}"
    error = difference(actual, expected)
    LOG.info("%s: relative difference %.1e", what, error)
    assert error <= tolerance, f"{what}: relative difference {error:.2e}"  # also fails on nan


# -- inference ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference(model: Transformer) -> None:
    """Logits are those of the naive float64 definition."""
    tokens = random_tokens(model, 2, 13)
    weights = {name: parameter.cpu() for name, parameter in model.named_parameters()}
    expected = torch.stack([reference_logits(weights, model.config, row.tolist()) for row in tokens])
    assert_close(model(tokens).cpu(), expected, "against the reference")


@torch.no_grad()
def in_chunks(model: Transformer, tokens: Tensor, sizes: Sequence[int], max_length: int | None = None) -> Tensor:
    """Logits of tokens [B, T] fed through a cache in chunks of these sizes."""
    assert sum(sizes) == tokens.shape[1]
    cache = ContiguousCache(model.config, tokens.shape[0], max_length or tokens.shape[1], device=tokens.device)
    return torch.cat([model(chunk, cache=cache) for chunk in tokens.split(list(sizes), dim=1)], dim=1)


@torch.no_grad()
def token_by_token(model: Transformer) -> None:
    """A cache fed one token at a time gives the logits of a run without a cache."""
    tokens = random_tokens(model, 2, 17)
    assert_close(in_chunks(model, tokens, [1] * 17), model(tokens), "token by token")


@torch.no_grad()
def chunked_prefill(model: Transformer) -> None:
    """So does one fed in chunks: shorter than, as long as, and longer than the windows; or all at once."""
    tokens = random_tokens(model, 2, 24)
    expected = model(tokens)
    for sizes in ([24], [5, 1, 5, 9, 1, 3], [2, 11, 5, 5, 1], [1, 23], [16, 8]):
        assert_close(in_chunks(model, tokens, sizes, max_length=30), expected, f"chunks of {sizes}")


@torch.no_grad()
def ragged_batch(model: Transformer) -> None:
    """Rows of different length in one batch give what each gives alone, in prefill and in the steps that follow."""
    schedule = ([5, 1, 9], [3, 8, 0], [1, 1, 1], [0, 2, 4], [1, 1, 1], [1, 1, 1], [6, 7, 2])
    totals = torch.tensor(schedule).sum(dim=0).tolist()
    tokens = random_tokens(model, len(totals), max(totals))
    alone = [model(tokens[row : row + 1, :total])[0] for row, total in enumerate(totals)]
    cache = ContiguousCache(model.config, len(totals), max(totals), device=tokens.device)
    done = [0] * len(totals)
    for step in schedule:
        columns = tokens.new_zeros(len(totals), max(step))  # what is not used is token 0
        for row, new in enumerate(step):
            columns[row, :new] = tokens[row, done[row] : done[row] + new]
        logits = model(columns, cache=cache, new_lengths=torch.tensor(step))
        for row, new in enumerate(step):
            expected = alone[row][done[row] : done[row] + new]
            if new:
                assert_close(logits[row, :new], expected, f"row {row} from token {done[row]}")
            done[row] += new
        assert cache.lengths.tolist() == done, f"cache counts {cache.lengths.tolist()} tokens, fed {done}"


@torch.no_grad()
def packed_documents(model: Transformer) -> None:
    """Documents packed into rows give what each gives alone."""
    lengths = ([4, 8, 1, 6], [11, 2, 5, 1])
    tokens = random_tokens(model, len(lengths), sum(lengths[0]))
    # Row 1 uses numbers in no particular order: only being equal counts.
    numbers = ([0, 1, 2, 3], [7, 3, 9, 1])
    ids = torch.stack(
        [torch.tensor(row).repeat_interleave(torch.tensor(ls)) for row, ls in zip(numbers, lengths, strict=True)]
    )
    packed = model(tokens, document_ids=ids.to(tokens.device))
    for row, row_lengths in enumerate(lengths):
        pieces = [model(piece[None])[0] for piece in tokens[row].split(row_lengths)]
        assert_close(packed[row], torch.cat(pieces), f"packed row {row}")


# -- training -----------------------------------------------------------------------------------------------------


def next_token_loss(model: Transformer, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def loss_and_gradients(model: Transformer, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = next_token_loss(model, tokens)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: no gradient for {sorted(expected.keys() ^ actual.keys())}"
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, f"{what}: gradient of {name}")


def activation_checkpointing(model: Transformer) -> None:
    """Recomputing activations in the backward pass changes neither the loss nor any gradient."""
    tokens = random_tokens(model, 2, 12)
    loss, gradients = loss_and_gradients(model, tokens)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for recompute in ("block", "group"):
        hook = model.model.layers[0].mlp.register_forward_pre_hook(count)
        model.model.activation_checkpointing = recompute
        runs = 0
        try:
            checkpointed_loss, checkpointed = loss_and_gradients(model, tokens)
        finally:
            model.model.activation_checkpointing = "none"
            hook.remove()
        assert runs == 2, f"{recompute}: the first layer ran {runs} times, so nothing was recomputed"
        assert_close(checkpointed_loss, loss, f"{recompute}: loss")
        assert_same_gradients(checkpointed, gradients, f"activation checkpointing by {recompute}")


def gradients(model: Transformer) -> None:
    """Loss and gradients of every parameter, in float64, are those of autograd through the naive definition."""
    tokens = random_tokens(model, 1, 9)
    model = copy.deepcopy(model).double()
    weights = {name: p.detach().cpu().clone().requires_grad_() for name, p in model.named_parameters()}
    expected_loss = reference_loss(weights, model.config, tokens.tolist())
    expected_loss.backward()
    expected = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for recompute in ("none", "block", "group"):
        model.model.activation_checkpointing = recompute
        loss, actual = loss_and_gradients(model, tokens)
        what = f"against the reference, activation_checkpointing={recompute}"
        assert_close(loss, expected_loss.detach(), f"{what}: loss")
        assert_same_gradients(actual, expected, what)


# -- structure ----------------------------------------------------------------------------------------------------


def owned_parameters(model: Transformer) -> None:
    """K and V weights exist where the plan says that a layer is its own source, and nowhere else; likewise the second
    norm, where the slot has other readers."""
    config = model.config
    keys, values = config.plan.key_sources, config.plan.value_sources
    names = {name for name, _ in model.named_parameters()}
    for layer in range(config.num_hidden_layers):
        owns_keys, owns_values = keys[layer] == layer, values[layer] == layer
        shared = keys.count(layer) > 1 or values.count(layer) > 1
        expected = {
            "self_attn.k_proj.weight": owns_keys,
            "self_attn.v_proj.weight": owns_values,
            "self_attn.k_proj.bias": owns_keys and config.attention_bias,
            "self_attn.v_proj.bias": owns_values and config.attention_bias,
            "self_attn.k_norm.weight": owns_keys and config.qk_norm,
            "kv_layernorm.weight": shared and config.separate_kv_norm,
        }
        for suffix, wanted in expected.items():
            name = f"model.layers.{layer}.{suffix}"
            assert (name in names) == wanted, f"{name} {'is missing' if wanted else 'should not exist'}"


def allocated_bytes(model: Transformer) -> None:
    """The cache takes, for every slot, bytes per element x KV heads x head_dim x min(context, widest reader)."""
    config = model.config
    for batch, context, dtype, size in ((1, 3, torch.float32, 4), (3, 64, torch.bfloat16, 2)):
        tokens = 0
        for sources in (config.plan.key_sources, config.plan.value_sources):
            for owner in set(sources):
                windows = [w for s, w in zip(sources, config.plan.windows, strict=True) if s == owner]
                tokens += context if None in windows else min(context, max(windows))
        expected = batch * tokens * config.num_key_value_heads * config.head_dim * size
        cache = ContiguousCache(config, batch, context, dtype=dtype)
        buffers = [*cache.keys.values(), *cache.values.values()]
        held = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
        assert held == cache.nbytes == expected, f"{held} bytes held, {cache.nbytes} reported, {expected} planned"


CHECKS: dict[str, Callable[[Transformer], None]] = {
    "reference": reference,
    "token by token": token_by_token,
    "chunked prefill": chunked_prefill,
    "ragged batch": ragged_batch,
    "packed documents": packed_documents,
    "activation checkpointing": activation_checkpointing,
    "gradients": gradients,
    "owned parameters": owned_parameters,
    "allocated bytes": allocated_bytes,
}
