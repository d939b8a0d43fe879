"""Peers' notations: round trips, exactly the plans that each can say, and the peers' own reading of what is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import SharingPlan, notations, parse_plan
from tests.plan.plans import orderly_plans, plans

PEERS = ("lm_engine", "lckv", "mlkv", "gemma3n", "gemma4", "mistral_large4", "deepseek", "hunyuan")


def writer(peer: str) -> Callable[[SharingPlan], dict[str, Any]]:
    return getattr(notations, f"to_{peer}")  # type: ignore[no-any-return]


def reader(peer: str) -> Callable[[dict[str, Any]], SharingPlan]:
    return getattr(notations, f"from_{peer}")  # type: ignore[no-any-return]


def written(peer: str, plan: SharingPlan) -> dict[str, Any] | None:
    """What the writer writes, None when it refuses."""
    try:
        return writer(peer)(plan)
    except UserError:
        return None


@pytest.mark.parametrize("peer", PEERS)
@given(plan=plans())
def test_a_plan_is_refused_by_layer_or_reads_back_as_it_was(peer: str, plan: SharingPlan) -> None:
    fragment = written(peer, plan)
    if fragment is None:
        with pytest.raises(UserError, match=r"\blayer \d+\b.*") as error:
            writer(peer)(plan)
        assert "\n" not in str(error.value)
    else:
        config = {"model_type": "whatever", "hidden_size": 64, **json.loads(json.dumps(fragment))}
        assert reader(peer)(config) == plan


# Every plan of four layers without windows and with one source for keys and values, and every config of four layers.
PLANS_OF_4 = [
    SharingPlan(sources)
    for sources in itertools.product(range(4), repeat=4)
    if all(sources[source] == source for source in sources)
]


def configs_of_4(peer: str) -> Iterator[dict[str, Any]]:
    depth = {"num_hidden_layers": 4}
    every_list = [list(sources) for sources in itertools.product(range(4), repeat=4)]
    if peer == "lm_engine":
        yield from ({"sharing_pattern": sources} for sources in every_list)
    elif peer == "lckv":
        yield from (depth | {"layer_types": "_".join(map(str, sources))} for sources in every_list)
    elif peer == "mlkv":
        yield from (depth | {"num_key_value_layers": owners} for owners in range(1, 5))
    elif peer in ("gemma3n", "gemma4"):
        yield from (
            depth | {"num_kv_shared_layers": shared, "layer_types": ["full_attention"] * 4} for shared in range(4)
        )
    elif peer == "mistral_large4":
        yield from (depth | {"kv_source_layers": sources, "no_rope_layers": [1] * 4} for sources in every_list)
    elif peer == "deepseek":
        yield from (
            depth | {"kv_source_layer_ids": list(owners)}
            for count in range(1, 5)
            for owners in itertools.combinations(range(4), count)
        )
    elif peer == "hunyuan":
        yield depth | {"use_cla": False}
        yield from (depth | {"use_cla": True, "cla_share_factor": factor} for factor in range(1, 6))


@pytest.mark.parametrize("peer", PEERS)
def test_a_writer_writes_exactly_the_plans_that_its_notation_can_say(peer: str) -> None:
    sayable = set()
    for config in configs_of_4(peer):
        try:
            sayable.add(reader(peer)(config))
        except UserError:
            continue
    assert {plan for plan in PLANS_OF_4 if written(peer, plan) is not None} == sayable
    assert parse_plan("identity", 4) in sayable
    assert 1 < len(sayable) <= len(PLANS_OF_4)


@pytest.mark.parametrize(
    ("peer", "plan", "message"),
    [
        (
            "lm_engine",
            "0,1,0",
            "layer 2 reads layer 0 after layer 1 read layer 1, but sharing_pattern may not decrease",
        ),
        ("lm_engine", "1,1", "layer 0 reads layer 1 above it"),
        ("lm_engine", "0@4,0@4", "layer 0 has a window of 4, but there are no windows"),
        ("lckv", "0@4,1@5", "layer 1 has a window of 5 after one of 4"),
        ("lckv", "0@4,0", "layer 1 attends to the whole context but reads layer 0"),
        ("mlkv", "0,0,2,3", "layer 1 reads layer 0, but its KV layers are spread evenly"),
        ("gemma3n", "0,0,2", "layer 1 reads layer 0, but only its last layers share"),
        ("gemma3n", "0@4,0", "layer 1 has no layer of type full_attention to read from"),
        ("gemma4", "0,1@4", "layer 1, the last, is windowed"),
        ("mistral_large4", "0,1,0,1", "layer 2 reads layer 0, but transformers would give it those of layer 1"),
        ("deepseek", "0,1,0", "layer 2 reads layer 0, but a layer reads the nearest source"),
        ("hunyuan", "0,1,1", "layer 1 reads layer 1, but layers share in groups of one size|layer 2 reads layer 1"),
        ("hunyuan", "0,0/0,1", "reads the keys of layer 0 and the values of layer 1"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(peer: str, plan: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        writer(peer)(SharingPlan.from_list(plan))


@pytest.mark.parametrize(
    ("peer", "config", "message"),
    [
        ("lm_engine", {}, "sharing_pattern is missing"),
        ("lm_engine", {"sharing_pattern": "0_0"}, "must be a list of layer numbers"),
        ("lm_engine", {"sharing_pattern": [0, 0, 1]}, "layer 2 reads the keys of layer 1, but layer 1 owns none"),
        ("lckv", {"layer_types": "0_0x"}, "layer 1 of layer_types"),
        ("lckv", {"layer_types": "0_0", "num_hidden_layers": 3}, "describes 2 layers, but num_hidden_layers is 3"),
        ("mlkv", {"num_hidden_layers": 4, "num_key_value_layers": 5}, "there are 4 layers"),
        ("mlkv", {"num_hidden_layers": 4, "num_key_value_layers": 0}, "must be a positive whole number"),
        (
            "gemma3n",
            {"num_hidden_layers": 2, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 2},
            "between 0 and 1",
        ),
        (
            "gemma3n",
            {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention", "chunked"]},
            "layer 1 has layer type 'chunked'",
        ),
        (
            "mistral_large4",
            {"kv_source_layers": [0, 0], "no_rope_layers": [0, 1]},
            "layer 1 reads layer 0, but transformers would give it none",
        ),
        ("mistral_large4", {"kv_source_layers": [1, 1], "no_rope_layers": [1, 1]}, "layer 0 reads layer 1 above it"),
        ("mistral_large4", {"kv_source_layers": [0, 0]}, "no_rope_layers is missing"),
        ("deepseek", {"num_hidden_layers": 4, "kv_source_layer_ids": [1]}, "layer 0 has no source"),
        ("deepseek", {"num_hidden_layers": 4, "kv_source_layer_ids": [0, 4]}, "source 4 is outside the 4 layers"),
        (
            "deepseek",
            {"num_hidden_layers": 4, "kv_source_layer_ids": [0], "compress_ratios": [1, 2]},
            "layer 1 compresses its K and V",
        ),
        (
            "deepseek",
            {"text_config": {"num_hidden_layers": 4, "kv_source_layer_ids": [0], "sliding_window": 128}},
            "also attend to a window of their own",
        ),
        ("hunyuan", {"num_hidden_layers": 4, "use_cla": True}, "cla_share_factor is missing"),
    ],
)
def test_a_config_that_says_no_plan_is_refused(peer: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reader(peer)(config)


def test_what_the_peers_document() -> None:
    read = notations.from_lckv({"layer_types": "0_0_0_5s_5s_5s_8_8_8"})
    assert read.key_sources == (0, 0, 0, 5, 5, 5, 8, 8, 8)
    assert read.windows == (None, None, None, 4096, 4096, 4096, None, None, None)
    mlkv = notations.from_mlkv({"num_hidden_layers": 32, "num_key_value_layers": 4})
    assert mlkv.owners == (0, 8, 16, 24)
    uneven = notations.from_mlkv({"num_hidden_layers": 11, "num_key_value_layers": 4})
    assert uneven.owners == (0, 2, 5, 8)  # every 2.75 layers, rounded down


# -- The peers' own code ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_configs() -> dict[str, Any]:
    pytest.importorskip("transformers")
    from transformers import Gemma3nTextConfig, Gemma4TextConfig

    return {"gemma3n": Gemma3nTextConfig, "gemma4": Gemma4TextConfig}


@pytest.mark.parametrize("peer", ["gemma3n", "gemma4"])
@given(plan=orderly_plans())
def test_transformers_gemma_shares_as_the_plan_says(
    peer: str, plan: SharingPlan, gemma_configs: dict[str, Any]
) -> None:
    fragment = written(peer, plan)
    if fragment is None:
        return
    theirs = gemma_configs[peer](**fragment)
    stored: dict[str, int] = {}  # as transformers does: by attention type, the newest layer whose mode is "store"
    for layer, mode in enumerate(theirs.kv_sharing_modes):
        kind = theirs.layer_types[layer]
        if mode == "store":
            stored[kind] = layer
        assert plan.key_sources[layer] == (stored[kind] if mode == "reuse" else layer)
        assert plan.windows[layer] == (theirs.sliding_window if kind == "sliding_attention" else None)


def test_the_shipped_gemma_3n_is_the_suffix_design(gemma_configs: dict[str, Any]) -> None:
    theirs = gemma_configs["gemma3n"]()
    config = json.loads(json.dumps({"text_config": theirs.to_dict()}, default=str))
    plan = notations.from_gemma3n(config)
    assert plan == parse_plan("suffix:15,window=512", 35)
    assert {plan.key_sources[layer] for layer in range(20, 35)} == {18, 19}
    assert notations.to_gemma3n(plan).items() <= theirs.to_dict().items()


@pytest.fixture(scope="module")
def mistral_large4() -> Any:
    pytest.importorskip("transformers.models.mistral_large4", reason="needs transformers with mistral_large4")
    from transformers.models.mistral_large4 import MistralLarge4TextConfig

    return MistralLarge4TextConfig


def test_transformers_mistral_large4_runs_exactly_the_accepted_plans_as_they_say(mistral_large4: Any) -> None:
    from huggingface_hub.errors import StrictDataclassError

    for plan in PLANS_OF_4:
        sources = list(plan.key_sources)
        for uses_rope in ([1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]):
            config = {"num_hidden_layers": 4, "kv_source_layers": sources, "no_rope_layers": uses_rope}
            try:
                theirs = mistral_large4(**config)
            except StrictDataclassError:
                runs = False
            else:
                stored: dict[int, int] = {}
                given = []
                for layer, mode in enumerate(theirs.kv_sharing_modes):
                    if mode == "store":
                        stored[uses_rope[layer]] = layer
                    reuses = mode in ("reuse", "reuse_but_indexer")
                    given.append(stored.get(uses_rope[layer]) if reuses else layer)
                runs = given == sources
            try:
                accepted = notations.from_mistral_large4(config) == plan
            except UserError:
                accepted = False
            assert accepted == runs, (sources, uses_rope)


@pytest.fixture(scope="module")
def mlx_hunyuan() -> ModuleType:
    return pytest.importorskip("mlx_lm.models.hunyuan")


@pytest.mark.parametrize("design", ["identity", "cla2", "cla3:rest=last", "cla4", "mlkv:1"])
def test_mlx_hunyuan_has_kv_projections_where_the_plan_says(design: str, mlx_hunyuan: ModuleType) -> None:
    plan = parse_plan(design, 7 if design == "cla3:rest=last" else 8)
    arguments = mlx_hunyuan.ModelArgs(
        model_type="hunyuan",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=False,
        moe_topk=1,
        num_experts=1,
        num_shared_expert=1,
        use_mixed_mlp_moe=False,
        use_qk_norm=False,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        **({"cla_share_factor": 1} | notations.to_hunyuan(plan)),
        rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    )
    layers = mlx_hunyuan.HunYuanModel(arguments).layers
    assert tuple(i for i, layer in enumerate(layers) if "k_proj" in layer.self_attn) == plan.owners


@given(st.sets(st.integers(1, 8)))
def test_mlx_deepseek_reads_the_sources_that_the_plan_says(others: set[int]) -> None:
    deepseek = pytest.importorskip("mlx_lm.models.deepseek_v41")
    plan = notations.from_deepseek({"num_hidden_layers": 9, "kv_source_layer_ids": [0, *others]})
    theirs = deepseek.ModelArgs(compress_ratios=[1] * 9, **notations.to_deepseek(plan))
    assert plan.key_sources == tuple(deepseek._shared_reads(theirs, layer)["compress_kv"] for layer in range(9))
