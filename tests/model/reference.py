"""The Transformer with shared keys and values, straight from its definition and as naive as can be.

Nothing here comes from crosslayer.model: one token, one head and one visible position at a time, in float64, rotary
embedding by complex multiplication. It takes weights by name and reads the sizes and the three lists of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from crosslayer.plan import ModelConfig


def reference_logits(
    weights: Mapping[str, Tensor], config: ModelConfig, tokens: Sequence[int], documents: Sequence[int] | None = None
) -> Tensor:
    """Logits [T, vocab_size] in float64 for one sequence of tokens, differentiable in `weights`."""
    plan = config.plan
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def weight(name: str) -> Tensor:
        return weights[f"{name}.weight"].double()

    def linear(name: str, x: Tensor) -> Tensor:
        y = weight(name) @ x
        bias = weights.get(f"{name}.bias")
        return y if bias is None else y + bias.double()

    def norm(name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + config.rms_norm_eps) * weight(name)

    def split(x: Tensor, head_norm: str | None = None) -> list[Tensor]:
        pieces = [x[start : start + size] for start in range(0, len(x), size)]
        return [norm(head_norm, piece) for piece in pieces] if head_norm else pieces

    def rotate(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[: size // 2], x[size // 2 :])
        angles = position * config.rope_theta ** (-torch.arange(size // 2, dtype=torch.float64) / (size / 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    def attend(query: Tensor, seen_keys: list[Tensor], seen_values: list[Tensor]) -> Tensor:
        if not seen_keys:
            return torch.zeros(size, dtype=torch.float64)
        scores = torch.stack([query @ key for key in seen_keys]) / math.sqrt(size)
        chances = torch.exp(scores - scores.max())
        chances = chances / chances.sum()
        return sum((chance * value for chance, value in zip(chances, seen_values, strict=True)), torch.zeros(size))

    stream = []
    keys: dict[int, list[list[Tensor]]] = {layer: [] for layer in plan.key_sources}  # position -> head -> vector
    values: dict[int, list[list[Tensor]]] = {layer: [] for layer in plan.value_sources}
    for position, token in enumerate(tokens):
        x = weight("model.embed_tokens")[token]
        for layer in range(plan.num_layers):
            prefix = f"model.layers.{layer}"
            attention = f"{prefix}.self_attn"
            head_norms = config.qk_norm
            separate = f"{prefix}.kv_layernorm.weight" in weights
            kv_input = norm(f"{prefix}.{'kv' if separate else 'input'}_layernorm", x)
            if plan.key_sources[layer] == layer:
                made = split(linear(f"{attention}.k_proj", kv_input), f"{attention}.k_norm" if head_norms else None)
                keys[layer].append([rotate(key, position) for key in made])
            if plan.value_sources[layer] == layer:
                values[layer].append(split(linear(f"{attention}.v_proj", kv_input)))
            layer_keys, layer_values = keys[plan.key_sources[layer]], values[plan.value_sources[layer]]
            window = plan.windows[layer]
            queries = linear(f"{attention}.q_proj", norm(f"{prefix}.input_layernorm", x))
            visible = [
                other
                for other in range(min(len(layer_keys), len(layer_values)))  # of a layer above, those before this token
                if (window is None or position - other < window)
                and (documents is None or documents[other] == documents[position])
            ]
            outputs = []
            for head, query in enumerate(split(queries, f"{attention}.q_norm" if head_norms else None)):
                group = head // (heads // groups)
                outputs.append(
                    attend(
                        rotate(query, position),
                        [layer_keys[other][group] for other in visible],
                        [layer_values[other][group] for other in visible],
                    )
                )
            x = x + linear(f"{attention}.o_proj", torch.cat(outputs))
            h = norm(f"{prefix}.post_attention_layernorm", x)
            gate, up = linear(f"{prefix}.mlp.gate_proj", h), linear(f"{prefix}.mlp.up_proj", h)
            x = x + linear(f"{prefix}.mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)
        stream.append(x)
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"  # tied
    return torch.stack([weight(head) @ norm("model.norm", x) for x in stream])


def reference_loss(weights: Mapping[str, Tensor], config: ModelConfig, rows: Sequence[Sequence[int]]) -> Tensor:
    """Mean next-token cross-entropy over rows of token ids, each predicting its own continuation."""
    losses = []
    for row in rows:
        logits = reference_logits(weights, config, row[:-1])
        losses += [torch.log(torch.exp(out).sum()) - out[token] for out, token in zip(logits, row[1:], strict=True)]
    return torch.stack(losses).mean()
