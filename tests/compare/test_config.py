"""Configs of comparisons: the default, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from crosslayer.compare import CompareConfig
from crosslayer.compare.config import DEFAULT
from crosslayer.errors import UserError
from crosslayer.plan.cost import kv_bytes_per_token
from crosslayer.settings import from_mapping, load_settings, to_mapping
from crosslayer.train import make_model_config

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_default_sets_sharing_against_shrinking_at_half_the_cache() -> None:
    config = load_settings(CompareConfig, DEFAULT)
    plain, shared, shrunk = (
        kv_bytes_per_token(
            make_model_config(config.training(design, 0).model, vocab_size=2048, eos_token_id=0, context=256)
        )
        for design in config.designs
    )
    assert shared == shrunk == plain / 2
    assert len(config.seeds) > 1
    assert config.data.source == "stdlib"
    assert config.sample is not None
    assert "CLA2" in config.sample.design


def test_a_run_has_its_design_seed_and_rate_and_the_common_recipe() -> None:
    config = from_mapping(
        CompareConfig,
        {
            "model": MODEL,
            "designs": ["MQA", "CLA2"],
            "seeds": [3, 5],
            "learning_rates": {"CLA2": "2e-3"},
            "train": {"learning_rate": 1e-3, "tokens": 9999},
        },
    )
    plain, shared = config.training("MQA", 3), config.training("CLA2", 5)
    assert (plain.model["design"], plain.train.seed, plain.train.learning_rate) == ("MQA", 3, 1e-3)
    assert (shared.model["design"], shared.train.seed, shared.train.learning_rate) == ("CLA2", 5, 2e-3)
    assert plain.train.tokens == shared.train.tokens == 9999
    assert plain.data == shared.data == config.data
    assert from_mapping(CompareConfig, to_mapping(config)) == config


def test_a_design_may_be_compared_with_itself_in_another_shape() -> None:
    data = {
        "model": MODEL,
        "designs": ["CLA2", "wide", "MQA"],
        "overrides": {"wide": {"design": "CLA2", "intermediate_size": 72}, "MQA": {"qk_norm": True}},
    }
    config = from_mapping(CompareConfig, data)
    assert config.training("CLA2", 0).model == {**MODEL, "design": "CLA2"}
    assert config.training("wide", 0).model == {**MODEL, "design": "CLA2", "intermediate_size": 72}
    assert config.training("MQA", 0).model == {**MODEL, "design": "MQA", "qk_norm": True}
    assert from_mapping(CompareConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"designs": []}, "at least one"),
        ({"seeds": []}, "at least one"),
        ({"designs": ["MQA", "mqa"]}, "same folder"),
        ({"designs": ["MQA", "yoco:window=8", "yoco_window=8"]}, "same folder"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"seeds": [-1]}, "different whole numbers"),
        ({"learning_rates": {"H4-MQA": 1e-3}}, "learning_rates.H4-MQA"),
        ({"learning_rates": {"MQA": -1.0}}, "learning_rate must be positive"),
        ({"overrides": {"CLA3": {"design": "CLA2"}}}, "overrides.CLA3: 'CLA3' is not compared"),
        ({"overrides": {"CLA2": {"hidden_sise": 3}}}, "overrides.CLA2: .*did you mean model.hidden_size"),
        ({"sample": {"design": "CLA3", "prompt": "x"}}, "sample.design"),
        ({"sample": {"design": "CLA2", "prompt": ""}}, "prompt"),
        ({"sample": {"design": "CLA2", "prompt": "x", "sampling": {"max_tokens": 0}}}, "sample.sampling: max_tokens"),
        ({"sample": {"design": "CLA2", "prompt": "x", "sampling": {"n": 2}}}, "sampling.n must be 1"),
        ({"model": {**MODEL, "design": "MQA"}}, "model.design"),
        ({"model": {**MODEL, "hidden_sise": 3}}, "did you mean model.hidden_size"),
        ({"train": {"seed": 1}}, "train.seed"),
        ({"desings": ["MQA"]}, "did you mean designs"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    data = {"model": MODEL, "designs": ["MQA", "CLA2"], **changes}
    with pytest.raises(UserError, match=message) as caught:
        from_mapping(CompareConfig, data)
    assert "\n" not in str(caught.value)


def test_a_design_that_cannot_be_built_is_no_error_of_the_config() -> None:
    config = CompareConfig(MODEL, ("MQA", "nonsense"))
    with pytest.raises(UserError, match="nonsense"):
        config.training("nonsense", 0)
