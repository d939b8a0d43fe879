"""The Transformer: a pre-norm decoder (RMSNorm, RoPE, SwiGLU) in which layers may read each other's keys and values.

One forward pass serves training, evaluation and inference. Parameters have the names of a Llama checkpoint. Keys and
values pass from block to block as plain tensors, keys already rotated, so that activation checkpointing, sharding,
compilation and pipeline cuts see them.

Dimensions: B batch, T new tokens, S tokens that may be seen, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from crosslayer.errors import UserError
from crosslayer.model.attention import Mask, attend, attend_before, causal_mask
from crosslayer.model.cache import CacheStep, ContiguousCache
from crosslayer.model.loss import linear_cross_entropy
from crosslayer.model.rope import apply_rope, rope_tables
from crosslayer.plan import ModelConfig
from crosslayer.plan.cost import Recompute
from crosslayer.plan.sharing import PASSES, PASSES_WITH_GRADIENT

RopeTables = tuple[Tensor, Tensor]


def project(x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear maps of one input. Compiled, they are a single matmul: laying the weights side by side then costs
    nothing, as it is part of the cast to bfloat16. Weights spread over processes stay apart: they may be cut in
    different ways."""
    spread = any(isinstance(projection.weight, DTensor) for projection in projections)
    if len(projections) < 2 or spread or not torch.compiler.is_compiling():
        return tuple(projection(x) for projection in projections)
    weight = torch.cat(tuple(projection.weight for projection in projections))
    biases = tuple(projection.bias for projection in projections if projection.bias is not None)
    widths = [projection.out_features for projection in projections]
    return torch.split(nn.functional.linear(x, weight, torch.cat(biases) if biases else None), widths, dim=-1)


class Attention(nn.Module):
    """Attention of one layer: its own queries, and keys and values that are its own or another layer's.

    Those of a layer above are there only for the tokens before: to make a token's, this layer's output is needed.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        plan = config.plan
        self.reads_above = layer in plan.readers_below_owner

        def projection(heads: int) -> nn.Linear:
            return nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.attention_bias)

        def head_norm() -> nn.RMSNorm | None:
            return nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

        self.q_proj = projection(config.num_attention_heads)
        self.k_proj = projection(config.num_key_value_heads) if plan.owns_keys(layer) else None
        self.v_proj = projection(config.num_key_value_heads) if plan.owns_values(layer) else None
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
        )
        self.q_norm = head_norm()
        self.k_norm = head_norm() if plan.owns_keys(layer) else None

    def forward(
        self,
        q_input: Tensor,
        kv_input: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        rope: RopeTables,
        mask: Mask,
        step: CacheStep | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend with given keys and values [B, G, S, D], making those that are None; return output, k and v."""
        own = [projection for projection in (self.k_proj, self.v_proj) if projection is not None]
        if kv_input is q_input:
            projected, *made = project(q_input, self.q_proj, *own)
        else:
            projected, made = self.q_proj(q_input), list(project(kv_input, *own))
        q = self._heads(projected, self.q_norm, rope).transpose(1, 2)
        if self.k_proj is not None:
            k = self._heads(made[0], self.k_norm, rope).transpose(1, 2)
            k = k if step is None else step.store_keys(self.layer, k)
        if self.v_proj is not None:
            # A copy, where V was made in one matmul with Q: as a view, it would keep all of that for the backward pass.
            v = self._split(made[-1]).contiguous().transpose(1, 2)
            v = v if step is None else step.store_values(self.layer, v)
        assert k is not None
        assert v is not None
        output = attend_before(q, k, v) if self.reads_above else attend(q, k, v, mask)
        return self.o_proj(output.transpose(1, 2).flatten(-2)), k, v

    def _split(self, projected: Tensor) -> Tensor:
        """[B, T, heads * D] as [B, T, heads, D]."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim)

    def _heads(self, projected: Tensor, norm: nn.RMSNorm | None, rope: RopeTables) -> Tensor:
        """Split [B, T, heads * D] into rotated heads [B, T, heads, D]."""
        heads = self._split(projected)
        return apply_rope(heads if norm is None else norm(heads), *rope)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        output: Tensor = self.down_proj(nn.functional.silu(gate) * up)
        return output


class Block(nn.Module):
    """One layer. Keys and values come in where another layer made them, and go out for the others."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.input_layernorm = norm()
        # Owners of a shared slot normalise their input a second time, with a gain of its own (arXiv 2405.12981).
        self.kv_layernorm = norm() if config.has_kv_norm(layer) else None
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        rope: RopeTables,
        mask: Mask,
        step: CacheStep | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_input = self.input_layernorm(x)
        kv_input = q_input if self.kv_layernorm is None else self.kv_layernorm(x)
        attended, k, v = self.self_attn(q_input, kv_input, k, v, rope, mask, step)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Decoder(nn.Module):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing: Recompute = "none"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        *,
        step: CacheStep | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, hidden_size] after the final norm; arguments as in `Transformer.forward`."""
        plan, length, device = self.config.plan, input_ids.shape[1], input_ids.device
        if plan.loops and document_ids is not None:
            raise UserError(
                "packed documents (document_ids) cannot be combined with layers that read a layer above them"
            )
        masks: list[Mask]
        if step is None:
            positions = torch.arange(length, device=device)[None]
            by_window = {window: causal_mask(length, window, document_ids, device) for window in set(plan.windows)}
            masks = [by_window[window] for window in plan.windows]
        else:
            if document_ids is not None:
                raise UserError("packed documents (document_ids) cannot be combined with a cache")
            positions = step.positions
            masks = [step.mask(layer) for layer in range(plan.num_layers)]

        rope = rope_tables(self.config, positions)
        x = self.embed_tokens(input_ids)
        if torch.is_autocast_enabled(device.type):  # the residual stream, too, is in the lower precision
            x = x.to(torch.get_autocast_dtype(device.type))
        recompute = self.activation_checkpointing if step is None and torch.is_grad_enabled() else "none"
        if recompute == "group":
            for layers in plan.layer_groups:
                x = checkpoint(self._run, layers, x, rope, masks, None, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self._run(range(plan.num_layers), x, rope, masks, step, checkpoint_blocks=recompute == "block")
        if step is not None:
            step.finish()
        hidden: Tensor = self.norm(x)
        return hidden

    def _run(
        self,
        layers: range,
        x: Tensor,
        rope: RopeTables,
        masks: list[Mask],
        step: CacheStep | None,
        checkpoint_blocks: bool = False,
    ) -> Tensor:
        """Some layers, of which none reads a layer outside."""
        plan = self.config.plan
        loops = {loop.start: loop for loop in plan.loops}
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def run_once(some: range, x: Tensor, keys: dict[int, Tensor], values: dict[int, Tensor]) -> Tensor:
            for layer in some:
                key_source, value_source = plan.key_sources[layer], plan.value_sources[layer]
                k = None if plan.owns_keys(layer) else keys[key_source]
                v = None if plan.owns_values(layer) else values[value_source]
                inputs = (x, k, v, rope, masks[layer], step)
                if checkpoint_blocks:
                    x, k, v = checkpoint(self.layers[layer], *inputs, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, k, v = self.layers[layer](*inputs)
                keys[key_source], values[value_source] = k, v
            return x

        layer = layers.start
        while layer < layers.stop:
            some = loops.get(layer, range(layer, layer + 1))
            if layer in loops:
                _zeros_from_above(self.config, some, x, keys, values)
                for number in range(PASSES + PASSES_WITH_GRADIENT - 1):
                    with torch.set_grad_enabled(torch.is_grad_enabled() and number >= PASSES):
                        run_once(some, x, keys, values)
                    if number == PASSES - 1:  # what autocast has kept of the weights leads to no gradients
                        torch.clear_autocast_cache()
            x = run_once(some, x, keys, values)
            layer = some.stop
            for slots, kept in ((plan.key_slots, keys), (plan.value_slots, values)):
                for source in [source for source in kept if slots[source].readers[-1] < layer]:
                    del kept[source]
        return x


def _zeros_from_above(
    config: ModelConfig, layers: range, x: Tensor, keys: dict[int, Tensor], values: dict[int, Tensor]
) -> None:
    """What `layers` read of layers above them before those have run."""
    # Laid out as what comes later is, for which blocks are compiled anyway.
    zeros = x.new_zeros(*x.shape[:2], config.num_key_value_heads, config.head_dim).transpose(1, 2)
    for sources, made in ((config.plan.key_sources, keys), (config.plan.value_sources, values)):
        made.update({sources[layer]: zeros for layer in layers if sources[layer] > layer})


class Transformer(nn.Module):
    """A language model built from a ModelConfig, with weights drawn from N(0, initializer_range²).

    Raises:
        UserError: a layer that reads a layer above itself has a window.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        for layer in config.plan.readers_below_owner:
            if config.plan.windows[layer] is not None:
                raise UserError(f"layer {layer} reads a layer above it, and cannot have a window besides")
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters(seed)

    def tie_weights(self) -> None:
        """Where the config says so, make the output projection the embedding: again after either was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw all matrices from N(0, initializer_range²); gains become 1 and biases 0.

        Each matrix depends on the seed and its own name only, so designs that differ in their plan start from the
        same weights wherever they have the same matrices.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # The CPU's generator heeds only the lower 32 bits of its seed.
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(drawn.normal_(std=self.config.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: ContiguousCache | None = None,
        new_lengths: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] for token ids [B, T]; with `targets` [B, T], the sum of their losses instead.

        The loss of a target is its -log probability in nats; negative targets are left out. With a `cache`, the tokens
        continue each row; rows that bring fewer than T tokens say so in `new_lengths` [B], and what follows is
        ignored. With `document_ids` [B, T], tokens attend only within their own document.
        """
        step = None if cache is None else cache.begin(input_ids, new_lengths)
        hidden = self.model(input_ids, step=step, document_ids=document_ids)
        if targets is not None:
            return linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits: Tensor = self.lm_head(hidden)
        return logits
