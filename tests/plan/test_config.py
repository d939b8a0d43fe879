"""ModelConfig: Llama, Mistral and Qwen configs as transformers reads them, ours read back, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import ModelConfig, RopeScaling, SharingPlan
from tests.plan.plans import plans

SIZES = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}
SHARED_FIELDS = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("initializer_range", *SIZES),
)

flags = st.fixed_dictionaries({
    "num_key_value_heads": st.sampled_from((1, 2, 4)),
    "head_dim": st.sampled_from((6, 32, 46)),
    "tie_word_embeddings": st.booleans(),
    "attention_bias": st.booleans(),
    "attention_output_bias": st.booleans(),
    "qk_norm": st.booleans(),
    "separate_kv_norm": st.booleans(),
    "rope_theta": st.sampled_from((10000.0, 500000.0)),
    "rope_scaling": st.none() | st.just(RopeScaling("llama3", 8.0, 2048)) | st.just(RopeScaling("yarn", 4.0, 512)),
    "eos_token_id": st.none() | st.just(2) | st.just((2, 3)),
})  # fmt: skip


@given(plans(), flags)
def test_config_json_reads_back(plan: SharingPlan, values: dict[str, Any]) -> None:
    config = ModelConfig(**SIZES | {"num_hidden_layers": plan.num_layers, "num_attention_heads": 4}, **values)
    config = config.with_plan(plan)
    data = json.loads(json.dumps(config.to_dict()))
    back = ModelConfig.from_dict(data)
    if config.model_type != "crosslayer":  # where nothing is shared the separate norm says nothing, and is not written
        assert not any(config.has_kv_norm(layer) for layer in range(plan.num_layers))
        data["separate_kv_norm"] = config.separate_kv_norm
        back = ModelConfig.from_dict(data)
    assert back == config


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-4, "tie_word_embeddings": True},
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": None},
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ],
    ids=["defaults", "sizes", "windows", "windows-off", "no-window", "layer-types"],
)
def test_a_config_means_what_it_means_to_transformers(kind: str, extra: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(kind, **SIZES, **extra)
    ours = ModelConfig.from_dict({"model_type": kind, **SIZES, **extra})
    for name in SHARED_FIELDS:
        expected = getattr(theirs, name, None)  # Qwen2's head_dim is hidden_size / num_attention_heads where not given
        assert getattr(ours, name) == (4 if expected is None else expected), name
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) if kind.startswith("qwen") else None
    for layer in range(4):
        slides = kind != "llama" and (kinds is None or kinds[layer] == "sliding_attention")
        assert ours.plan.windows[layer] == (window if slides else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: llama"),
        ({"hidden_act": "gelu"}, "this model uses silu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "128"}, "hidden_size must be a positive whole number, got '128'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads \(5\) must divide num_attention_heads \(32\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, got 'small'"),
        ({"max_position_embeddings": "abc"}, "max_position_embeddings must be a positive whole number, got 'abc'"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rope_theta": "high"}, "rope_theta must be a positive number, got 'high'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object such as .*, got 'linear'"),
        ({"rope_parameters": ["linear"]}, "rope_parameters must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "big"}}, "rope_scaling.factor must be a number, got 'big'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor must be positive"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "length": 3}}, "'length' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs original_max_position_embeddings"),
        ({"model_type": "crosslayer"}, "needs a sharing_plan"),
        (
            {"model_type": "crosslayer", "sharing_plan": {"key_sources": [0, 0]}},
            "the sharing plan has 2 layers but num_hidden_layers is 4",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear_attention"] * 4},
            "layer 0: layer_types 'linear_attention' is not supported",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "two"},
            "max_window_layers and layer_types must be a whole number and a list, got 'two' and None",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **SIZES, **changes}))
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.from_json_file(tmp_path)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "crosslayer"])
def test_a_wrong_type_anywhere_is_refused_in_a_line_or_means_nothing(kind: str) -> None:
    """Every key, with everything that JSON may put there: never another exception."""
    wrong = ["abc", [], ["a"], {}, {"a": 1}, -1, 0, 1.5, True, None, [[1]], math.nan]
    scaling = {"factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.0, "truncate": True}
    whole = {"model_type": kind, **SIZES, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
    whole |= {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "eos_token_id": 2}
    whole |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}
    whole |= {"rope_scaling": {"rope_type": "yarn", **scaling}, "sharing_plan": {"key_sources": [0, 0, 2, 2]}}
    assert ModelConfig.from_dict(whole)
    configs = [{**whole, key: value} for key in (*whole, "rope_parameters") for value in wrong]
    for section in ("rope_scaling", "sharing_plan"):
        keys = [*whole[section], "windows", "type"]
        configs += [{**whole, section: {**whole[section], key: value}} for key in keys for value in wrong]
    refusals = []
    for data in configs:
        try:
            ModelConfig.from_dict(data)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > len(configs) / 2
    assert "\n" not in "".join(refusals)


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"])
def test_a_file_that_is_no_config_is_refused(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"broken\.json: "):
        ModelConfig.from_json_file(file)
