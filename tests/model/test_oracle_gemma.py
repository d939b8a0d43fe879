"""Gemma 3n and Gemma 4 of transformers: which layer reads whose keys and values, and what attention makes of them.

Their blocks differ from ours (four norms, AltUp, per-layer inputs, a norm on values), so what is compared is the
wiring, observed while their model runs, and each attention module on the inputs that it saw there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import Gemma3nTextConfig, Gemma4TextConfig
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.gemma4 import modeling_gemma4

from crosslayer.model.attention import causal_mask
from crosslayer.model.rope import rope_tables
from crosslayer.model.transformer import Attention
from tests.conftest import tiny_config
from tests.model.checks import assert_close

WINDOW = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "sliding_window": WINDOW,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 100.0} for kind in ("full_attention", "sliding_attention")
    },
}


@dataclass
class Seen:
    """What the attention module of each layer met in one run."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def source(self, layer: int) -> int:
        """The lowest layer with the very keys and values that this layer attended to."""
        return next(
            other
            for other in sorted(self.keys)
            if torch.equal(self.keys[other], self.keys[layer]) and torch.equal(self.values[other], self.values[layer])
        )


def run(monkeypatch: pytest.MonkeyPatch, family: str, layers: int, shared: int, period: int) -> tuple[Any, Seen]:
    kinds = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
    shape = {**SHAPE, "num_hidden_layers": layers, "num_kv_shared_layers": shared, "layer_types": kinds}
    torch.manual_seed(0)
    if family == "gemma3n":
        module = modeling_gemma3n
        model = module.Gemma3nTextModel(
            Gemma3nTextConfig(**shape, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * layers)
        )
    else:
        module = modeling_gemma4
        model = module.Gemma4TextModel(Gemma4TextConfig(**shape, global_head_dim=10))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + (parameter.ndim == 1))
    seen = Seen()
    eager = module.eager_attention_forward

    def spy(attention: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.keys[attention.layer_idx], seen.values[attention.layer_idx] = key, value
        return eager(attention, query, key, value, *args, **kwargs)

    def record(attention: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.inputs[attention.layer_idx] = args[0] if args else kwargs["hidden_states"]
        seen.outputs[attention.layer_idx] = output[0]

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    for layer in model.layers:
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model.eval()(input_ids=torch.randint(61, (2, 13)), use_cache=False)
    return model, seen


CASES = [(6, 2, 2), (6, 3, 3), (8, 4, 2), (10, 4, 5), (12, 5, 4), (9, 6, 3), (6, 5, 1)]


@pytest.mark.parametrize(("layers", "shared", "period"), CASES)
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_suffix_sharing(monkeypatch: pytest.MonkeyPatch, family: str, layers: int, shared: int, period: int) -> None:
    theirs, seen = run(monkeypatch, family, layers, shared, period)
    config = tiny_config(f"suffix:{shared},window={WINDOW},period={period}", num_hidden_layers=layers, qk_norm=True)
    plan = config.plan
    assert tuple(seen.source(layer) for layer in range(layers)) == plan.key_sources == plan.value_sources

    rope = rope_tables(config, torch.arange(13)[None])
    for layer in range(layers):
        ours = Attention(config, layer)
        weights = {
            name: tensor * config.head_dim**0.5 if name == "q_norm.weight" else tensor  # they do not divide by sqrt(D)
            for name, tensor in theirs.layers[layer].self_attn.state_dict().items()
        }
        ours.load_state_dict(weights)  # strict: ours has projections and norms exactly where theirs has
        x, source = seen.inputs[layer], plan.key_sources[layer]
        mask = causal_mask(13, plan.windows[layer], None, x.device)
        with torch.no_grad():
            given = (None, None) if source == layer else (seen.keys[source], seen.values[source])
            output, k, v = ours(x, x, *given, rope, mask, None)
        if source != layer:
            assert_close(output, seen.outputs[layer], f"attention of layer {layer}")
        else:
            assert_close(k, seen.keys[layer], f"keys of layer {layer}")
            assert_close(rms_norm(v, v.shape[-1:], eps=1e-5), seen.values[layer], f"values of layer {layer}")
