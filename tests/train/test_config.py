"""The settings of a training run: ranges, model shapes, presets and designs."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from crosslayer.errors import UserError
from crosslayer.plan import ModelConfig, RopeScaling, parse_design, preset
from crosslayer.settings import from_mapping, to_mapping
from crosslayer.train import Recipe, TrainConfig, make_model_config
from tests.train.runs import MODEL, config


def model_config(**settings: Any) -> ModelConfig:
    return make_model_config(settings, vocab_size=300, eos_token_id=0, context=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"eval_tokens": 0}, "eval_tokens must be at least 1"),
        ({"eval_every": -1}, "eval_every must not be negative"),
        ({"checkpoint_every": -5}, "checkpoint_every must not be negative"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must lie between 0 and 1"),
        ({"final_ratio": -0.1}, "final_ratio must lie between 0 and 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size must divide batch_size 8, got 3"),
        ({"micro_batch_size": 0}, "micro_batch_size must divide"),
        (
            {"tokens": 100, "batch_size": 4, "sequence_length": 32},
            "tokens .100. must cover at least one batch of 4 x 32",
        ),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


def test_the_paper_is_the_default() -> None:
    recipe = Recipe()
    assert (recipe.betas, recipe.weight_decay, recipe.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (recipe.warmup_ratio, recipe.final_ratio) == (0.05, 0.1)


def test_steps_are_whole_batches() -> None:
    recipe = Recipe(tokens=1000, sequence_length=16, batch_size=4)
    assert (recipe.tokens_per_step, recipe.steps) == (64, 15)


def test_a_model_gets_what_the_config_leaves_open_from_the_data() -> None:
    model = model_config(**MODEL)
    assert (model.vocab_size, model.eos_token_id, model.max_position_embeddings) == (300, 0, 16)
    assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (2, 1, 16)
    assert model.plan.key_sources == (0, 0, 2, 2)


def test_presets() -> None:
    assert model_config(preset="paper-1b", design="H90-MQA-CLA2").to_dict() == {
        **parse_design("H90-MQA-CLA2", preset("paper-1b")).to_dict(),
        "eos_token_id": 0,
    }
    smaller = model_config(preset="paper-1b", num_hidden_layers=4, vocab_size=512, design="0,0,2,2")
    assert (smaller.hidden_size, smaller.num_hidden_layers, smaller.vocab_size) == (2048, 4, 512)
    assert model_config(preset="paper-3b").plan.is_identity


def test_rope_scaling() -> None:
    scaling = {"rope_type": "linear", "factor": 2}
    assert model_config(**MODEL, rope_scaling=scaling).rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hiden_size": 32}, "unknown key model.hiden_size; did you mean model.hidden_size?"),
        ({"dessign": "cla2"}, "unknown key model.dessign; did you mean model.design?"),
        ({"sharing_plan": [0, 0]}, "unknown key model.sharing_plan"),  # the design says it
        ({"preset": "paper-2b"}, "unknown preset 'paper-2b'; known: paper-1b, paper-3b"),
        ({"preset": ["paper-1b"]}, "unknown preset"),
        ({"hidden_size": "wide"}, "model.hidden_size must be a whole number, got 'wide'"),
        ({"rope_scaling": {"rope_type": "linear", "faktor": 2}}, "did you mean model.rope_scaling.factor?"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "model.rope_scaling: rope scaling factor"),
        ({"num_key_value_heads": 3}, "model: num_key_value_heads (3) must divide"),
        ({"vocab_size": 299}, "model.vocab_size 299 is less than the tokenizer's 300"),
        ({"vocab_size": 2e2}, "model.vocab_size 200 is less than the tokenizer's 300"),
        ({"max_position_embeddings": 8}, "model.max_position_embeddings 8 is less than train.sequence_length 16"),
        ({"design": "MQA-CLAA2"}, "'cla2'"),
        ({"design": [0, 0, 2, 2]}, "model.design must be text such as H128-MQA-CLA2, cla2 or 0,0,2,2"),
        ({"design": "0,0"}, "lists 2 layers, but the model has 4"),
    ],
)
def test_models_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        model_config(**{**MODEL, **settings})
    assert message in str(caught.value)


def test_a_vocabulary_may_have_room_to_spare() -> None:
    assert model_config(**MODEL, vocab_size=512).vocab_size == 512
    assert model_config(**(MODEL | {"design": None})).plan.is_identity


def test_a_bad_model_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(UserError, match=r"^unknown key model\.hiden_size; did you mean model\.hidden_size\?$"):
        TrainConfig({**MODEL, "hiden_size": 3})
    with pytest.raises(UserError, match=r"^model\.hidden_size is missing$"):
        TrainConfig({"num_hidden_layers": 4})


def test_the_guide_explains_every_setting() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    model = {field.name for field in fields(ModelConfig)} - {"sharing_plan", "bos_token_id", "eos_token_id"}
    for name in model | {"preset", "design"} | {field.name for field in fields(Recipe)}:
        assert f"`{name}`" in guide, name


def test_a_config_survives_its_mapping() -> None:
    settings = config(micro_batch_size=2, mask_documents=True)
    assert from_mapping(TrainConfig, to_mapping(settings)) == settings
