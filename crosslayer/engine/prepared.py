"""A model laid out for inference: fewer, larger matrix products, and keys and values in a paged cache.

What `Transformer` does in many steps is one here: the gains of a layer's norms are part of the weights that follow
them, so the projections to queries, keys and values are one matrix, whichever of the two norms they come after, and so
are gate and up. The division by the root mean square commutes with the product and is left to the kernel behind it.
Everything is in the model's precision, and the results are the model's but for the rounding of gain times weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from crosslayer.engine.batch import Batch
from crosslayer.kernels.paged_attention import AttentionRows, paged_attention
from crosslayer.kernels.project import project_add, project_logits, project_rope_store, project_swiglu
from crosslayer.kernels.tokens import embed
from crosslayer.model import Transformer
from crosslayer.model.paged import PagedCache
from crosslayer.model.rope import rope_tables
from crosslayer.model.transformer import Block


@dataclass(frozen=True)
class PreparedLayer:
    """Weights of one layer: `qkv` [(H + 0 to 2 G) D, hidden] makes queries and, where it owns them, keys and values, in
    this order; `gate_up` [2 I, hidden] the gates and then what they let through."""

    qkv: Tensor
    qkv_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, block: Block, device: torch.device) -> PreparedLayer:
        attention, mlp = block.self_attn, block.mlp
        kv_norm = block.kv_layernorm or block.input_layernorm
        own = [p for p in (attention.k_proj, attention.v_proj) if p is not None]
        normed = [(block.input_layernorm, attention.q_proj), *((kv_norm, projection) for projection in own)]
        biases = tuple(projection.bias for _, projection in normed)

        def there(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device)

        def fold(norm: nn.RMSNorm, projection: nn.Linear) -> Tensor:
            weight, gain = there(projection.weight), there(norm.weight)
            exact = torch.promote_types(weight.dtype, torch.float32)
            return (weight.to(exact) * gain.to(exact)).to(weight.dtype)

        return cls(
            qkv=torch.cat([fold(*pair) for pair in normed]),
            qkv_bias=None if biases[0] is None else there(torch.cat(biases)),
            q_gain=None if attention.q_norm is None else there(attention.q_norm.weight),
            k_gain=None if attention.k_norm is None else there(attention.k_norm.weight),
            out=there(attention.o_proj.weight),
            out_bias=None if attention.o_proj.bias is None else there(attention.o_proj.bias),
            gate_up=torch.cat([fold(block.post_attention_layernorm, p) for p in (mlp.gate_proj, mlp.up_proj)]),
            down=there(mlp.down_proj.weight),
        )


class PreparedModel:
    """A model on a device, for sequences of up to `max_length` tokens over a cache.

    Weights that gains are folded into are copies; the others are the model's own, if that is on the device already.
    """

    def __init__(self, model: Transformer, max_length: int, device: torch.device) -> None:
        self.config = model.config
        self.layers = [PreparedLayer.of(cast(Block, block), device) for block in model.model.layers]
        self.lm_head = model.lm_head.weight.detach().to(device)
        self.embedding = model.model.embed_tokens.weight.detach().to(device)
        if model.config.tie_word_embeddings:
            self.embedding = self.lm_head
        self.norm_gain = model.model.norm.weight.detach().to(device)
        positions = torch.arange(max_length, device=device)[None]
        self.cos, self.sin = (table[0, :, 0].contiguous() for table in rope_tables(self.config, positions))

    @torch.inference_mode()
    def logits(self, batch: Batch, last: Tensor, cache: PagedCache) -> Tensor:
        """Store the batch's keys and values, and return the logits [n, vocab_size] that it wants. `last` are the tokens
        last drawn, by slot."""
        plan, rows, wanted = self.config.plan, batch.rows, batch.wanted
        x, cos, sin = embed(batch.ids, batch.slots, last, self.embedding, batch.positions, self.cos, self.sin)
        for number in range(plan.num_layers):
            span = cache.spans[number]
            q = self._store(number, x, cos, sin, batch.places[span], cache)
            if wanted is not None and number == plan.prefill_cut - 1:
                # All slots are filled; what is left is of use only to tokens whose logits are asked for.
                q, x, cos, sin, rows, wanted = q[wanted], x[wanted], cos[wanted], sin[wanted], batch.wanted_rows, None
                if not len(x):
                    break
            self._add(number, q, x, rows[span], cache)
        return project_logits(x, self.lm_head, self.norm_gain, self.config.rms_norm_eps)

    def _store(self, number: int, x: Tensor, cos: Tensor, sin: Tensor, places: Tensor, cache: PagedCache) -> Tensor:
        """The queries [N, H, D] of a layer from the residual stream x [N, hidden]; its keys and values are stored."""
        layer, config, plan, scales = self.layers[number], self.config, self.config.plan, cache.scales
        return project_rope_store(
            x,
            layer.qkv,
            config.rms_norm_eps,
            cos,
            sin,
            head_dim=config.head_dim,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            bias=layer.qkv_bias,
            q_gain=layer.q_gain,
            k_gain=layer.k_gain,
            keys=cache.keys.get(number),
            values=cache.values.get(number),
            places=places,
            key_scale=scales.keys[plan.key_sources[number]],
            value_scale=scales.values[plan.value_sources[number]],
        )

    def _add(self, number: int, q: Tensor, x: Tensor, rows: AttentionRows, cache: PagedCache) -> None:
        """Let a layer with queries q [N, H, D] add its share to the residual stream x [N, hidden]."""
        layer, config, plan, scales = self.layers[number], self.config, self.config.plan, cache.scales
        key_source, value_source = plan.key_sources[number], plan.value_sources[number]
        attended = paged_attention(
            q,
            cache.keys[key_source],
            cache.values[value_source],
            rows,
            window=plan.windows[number],
            key_scale=scales.keys[key_source],
            value_scale=scales.values[value_source],
            ahead=layer.gate_up,
        )
        project_add(attended.flatten(1), layer.out, x)
        if layer.out_bias is not None:
            x += layer.out_bias
        project_add(project_swiglu(x, layer.gate_up, config.rms_norm_eps), layer.down, x)
