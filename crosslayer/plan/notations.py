"""Sharing plans in other projects' notations: `to_X(plan)` gives the keys of X's config, `from_X(config)` reads them.

A writer refuses a plan that its target cannot express or would run as another model, and a reader refuses a config
that means more than a plan can say: a UserError that gives the layer and the reason. Nothing is approximated, so what
a writer writes its reader reads back as the same plan. Configs may be whole ones; other keys are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crosslayer.errors import UserError
from crosslayer.plan.sharing import SharingPlan

Config = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


# -- lm-engine, formerly dolomite: one source a layer, never decreasing -------------------------------------------


def to_lm_engine(plan: SharingPlan) -> dict[str, Any]:
    """`sharing_pattern` of lm-engine's gpt_crosslayer model."""
    peer = "lm-engine"
    _refuse_two_sources(plan, peer)
    _refuse_windows(plan, peer)
    _refuse_sources_above(plan, peer)
    for layer in range(1, plan.num_layers):
        before, source = plan.key_sources[layer - 1 : layer + 1]
        if source < before:
            raise UserError(
                f"{peer}: layer {layer} reads layer {source} after layer {layer - 1} read layer {before}, "
                "but sharing_pattern may not decrease"
            )
    return {"sharing_pattern": list(plan.key_sources)}


def from_lm_engine(config: Config) -> SharingPlan:
    plan = _plan("lm-engine", _integers(config, "sharing_pattern", "lm-engine"))
    to_lm_engine(plan)  # what lm-engine could not have run is refused here too
    return plan


# -- LCKV: one source a layer, any order, one window size --------------------------------------------------------


def to_lckv(plan: SharingPlan) -> dict[str, Any]:
    """`layer_types` of LCKV's Llama, such as `0_0_2_2s`; its window size is `sliding_window`."""
    peer = "LCKV"
    _refuse_two_sources(plan, peer)
    window = _one_window(plan, peer)
    for layer, source in enumerate(plan.key_sources):
        if plan.windows[layer] is None and plan.windows[source] is not None:
            raise UserError(
                f"{peer}: layer {layer} attends to the whole context but reads layer {source}, "
                "of which LCKV caches only the window"
            )
    entries = (
        f"{source}s" if window_ else f"{source}" for source, window_ in zip(plan.key_sources, plan.windows, strict=True)
    )
    fragment: dict[str, Any] = {"num_hidden_layers": plan.num_layers, "layer_types": "_".join(entries)}
    return fragment | ({"sliding_window": window} if window else {})


def from_lckv(config: Config) -> SharingPlan:
    text = _get(config, "layer_types", "LCKV")
    entries = [re.fullmatch(r"(\d+)(s?)", entry) for entry in str(text).split("_")]
    for layer, entry in enumerate(entries):
        if entry is None:
            raise UserError(f"LCKV: layer {layer} of layer_types {text!r} is not a layer number, or one followed by s")
    _check_depth(config, len(entries), "layer_types", "LCKV")
    window = config.get("sliding_window", 4096)  # LCKV's own default
    return _plan(
        "LCKV",
        [int(entry[1]) for entry in entries if entry],
        [window if entry[2] else None for entry in entries if entry],
    )


# -- pythia-mlkv: a number of KV layers, spread evenly ------------------------------------------------------------


def to_mlkv(plan: SharingPlan) -> dict[str, Any]:
    """`num_key_value_layers` of pythia-mlkv."""
    peer = "pythia-mlkv"
    _refuse_two_sources(plan, peer)
    _refuse_windows(plan, peer)
    fragment = {"num_hidden_layers": plan.num_layers, "num_key_value_layers": len(plan.owners)}
    _refuse_difference(plan, from_mlkv(fragment), peer, "its KV layers are spread evenly from layer 0")
    return fragment


def from_mlkv(config: Config) -> SharingPlan:
    layers, owners = (_positive(config, key, "pythia-mlkv") for key in ("num_hidden_layers", "num_key_value_layers"))
    if owners > layers:
        raise UserError(f"pythia-mlkv: num_key_value_layers is {owners}, but there are {layers} layers")
    # In floating point, as pythia-mlkv computes it.
    return _nearest_owner(layers, {int(i * (layers / owners)) for i in range(owners)})


# -- Gemma 3n and 4 in transformers: a suffix without K and V -----------------------------------------------------


def to_gemma3n(plan: SharingPlan) -> dict[str, Any]:
    """`num_kv_shared_layers`, `layer_types` and `sliding_window` of Gemma 3n in transformers."""
    return _to_gemma(plan, "Gemma 3n")


def from_gemma3n(config: Config) -> SharingPlan:
    return _from_gemma(config, "Gemma 3n")


def to_gemma4(plan: SharingPlan) -> dict[str, Any]:
    """As `to_gemma3n`, for Gemma 4, whose last layer always attends to the whole context."""
    fragment = _to_gemma(plan, "Gemma 4")
    from_gemma4(fragment)
    return fragment


def from_gemma4(config: Config) -> SharingPlan:
    plan = _from_gemma(config, "Gemma 4")
    if plan.windows[-1] is not None:
        raise UserError(
            f"Gemma 4: layer {plan.num_layers - 1}, the last, is windowed; transformers would make it {FULL}"
        )
    return plan


def _to_gemma(plan: SharingPlan, peer: str) -> dict[str, Any]:
    _refuse_two_sources(plan, peer)
    window = _one_window(plan, peer)
    fragment: dict[str, Any] = {
        "num_hidden_layers": plan.num_layers,
        "num_kv_shared_layers": plan.num_layers - 1 - plan.owners[-1],
        "layer_types": [FULL if window_ is None else SLIDING for window_ in plan.windows],
    }
    fragment |= {"sliding_window": window} if window else {}
    rule = "only its last layers share, each reading the last layer before them of its attention type"
    _refuse_difference(plan, _from_gemma(fragment, peer), peer, rule)
    return fragment


def _from_gemma(config: Config, peer: str) -> SharingPlan:
    config = config.get("text_config", config)
    layers = _positive(config, "num_hidden_layers", peer)
    kinds = _get(config, "layer_types", peer)
    if not isinstance(kinds, list | tuple):
        raise UserError(f"{peer}: layer_types must be a list of attention types, got {kinds!r}")
    _check_depth(config, len(kinds), "layer_types", peer)
    shared = _get(config, "num_kv_shared_layers", peer)
    if not isinstance(shared, int) or not 0 <= shared < layers:
        raise UserError(f"{peer}: num_kv_shared_layers must be between 0 and {layers - 1}, got {shared!r}")
    first = layers - shared
    last_unshared = {kind: layer for layer, kind in enumerate(kinds[:first])}
    for layer, kind in enumerate(kinds):
        if kind not in (FULL, SLIDING):
            raise UserError(f"{peer}: layer {layer} has layer type {kind!r}; known: {FULL}, {SLIDING}")
        if kind not in last_unshared:
            raise UserError(f"{peer}: layer {layer} has no layer of type {kind} to read from below layer {first}")
    window = _positive(config, "sliding_window", peer) if SLIDING in kinds else None
    return _plan(
        peer,
        [layer if layer < first else last_unshared[kind] for layer, kind in enumerate(kinds)],
        [window if kind == SLIDING else None for kind in kinds],
    )


# -- mistral_large4 in transformers: one source a layer, but one store for each position encoding ------------------


def to_mistral_large4(plan: SharingPlan) -> dict[str, Any]:
    """`kv_source_layers` of mistral_large4 in transformers, with RoPE in every layer (`no_rope_layers` all 1)."""
    peer = "mistral_large4"
    _refuse_two_sources(plan, peer)
    _refuse_windows(plan, peer)
    fragment = {
        "num_hidden_layers": plan.num_layers,
        "kv_source_layers": list(plan.key_sources),
        "no_rope_layers": [1] * plan.num_layers,
    }
    from_mistral_large4(fragment)
    return fragment


def from_mistral_large4(config: Config) -> SharingPlan:
    peer = "mistral_large4"
    config = config.get("text_config", config)
    plan = _plan(peer, _integers(config, "kv_source_layers", peer))
    _check_depth(config, plan.num_layers, "kv_source_layers", peer)
    uses_rope = _integers(config, "no_rope_layers", peer)
    _check_depth(config, len(uses_rope), "no_rope_layers", peer)
    _refuse_sources_above(plan, peer)
    # While it runs, transformers keeps the newest shared K and V of the layers with RoPE, and of those without, and
    # hands them to whichever layer of the same kind comes next, whatever source that layer names.
    newest: dict[int, int] = {}
    for layer, source in enumerate(plan.key_sources):
        kind = uses_rope[layer]
        if source == layer and plan.shares_slot(layer):
            newest[kind] = layer
        elif source != layer and newest.get(kind) != source:
            given = f"those of layer {newest[kind]}" if kind in newest else "none"
            raise UserError(
                f"{peer}: layer {layer} reads layer {source}, but transformers would give it {given}: "
                "it keeps only the newest shared keys and values"
            )
    return plan


# -- DeepSeek-V4.1: the layers that make global K and V ------------------------------------------------------------


def to_deepseek(plan: SharingPlan) -> dict[str, Any]:
    """`kv_source_layer_ids` in the manner of DeepSeek-V4.1: every layer reads the nearest source at or below it."""
    peer = "kv_source_layer_ids"
    _refuse_two_sources(plan, peer)
    _refuse_windows(plan, peer)
    fragment = {"num_hidden_layers": plan.num_layers, "kv_source_layer_ids": list(plan.owners)}
    rule = "a layer reads the nearest source at or below it"
    _refuse_difference(plan, from_deepseek(fragment), peer, rule)
    return fragment


def from_deepseek(config: Config) -> SharingPlan:
    """Reads only the sharing. DeepSeek's own configs add local windows and compressed K and V, and are refused."""
    peer = "kv_source_layer_ids"
    config = config.get("text_config", config)
    layers = _positive(config, "num_hidden_layers", peer)
    owners = _integers(config, "kv_source_layer_ids", peer)
    if config.get("sliding_window"):
        raise UserError(f"{peer}: layer 0 and all others also attend to a window of their own K and V (sliding_window)")
    for layer, ratio in enumerate(config.get("compress_ratios") or ()):
        if ratio != 1:
            raise UserError(f"{peer}: layer {layer} compresses its K and V (compress_ratios {ratio})")
    if 0 not in owners:
        raise UserError(f"{peer}: layer 0 has no source at or below it")
    if max(owners) >= layers:
        raise UserError(f"{peer}: source {max(owners)} is outside the {layers} layers")
    return _nearest_owner(layers, owners)


# -- Hunyuan: equal groups from layer 0 ----------------------------------------------------------------------------


def to_hunyuan(plan: SharingPlan) -> dict[str, Any]:
    """`use_cla` and `cla_share_factor` of Hunyuan."""
    peer = "Hunyuan"
    _refuse_two_sources(plan, peer)
    _refuse_windows(plan, peer)
    fragment: dict[str, Any] = {"num_hidden_layers": plan.num_layers, "use_cla": not plan.is_identity}
    if not plan.is_identity:
        fragment["cla_share_factor"] = (*plan.owners, plan.num_layers)[1]
    _refuse_difference(plan, from_hunyuan(fragment), peer, "layers share in groups of one size, counted from layer 0")
    return fragment


def from_hunyuan(config: Config) -> SharingPlan:
    layers = _positive(config, "num_hidden_layers", "Hunyuan")
    factor = _positive(config, "cla_share_factor", "Hunyuan") if _get(config, "use_cla", "Hunyuan") else 1
    return _nearest_owner(layers, range(0, layers, factor))


# -- What the notations have in common -----------------------------------------------------------------------------


def _nearest_owner(layers: int, owners: Iterable[int]) -> SharingPlan:
    """Every layer reads the last owner at or below it; layer 0 must own."""
    owners = set(owners)
    sources: list[int] = []
    for layer in range(layers):
        sources.append(layer if layer in owners else sources[-1])
    return SharingPlan(tuple(sources))


def _plan(peer: str, sources: Sequence[int], windows: Sequence[int | None] = ()) -> SharingPlan:
    try:
        return SharingPlan(tuple(sources), windows=tuple(windows))
    except UserError as error:
        raise UserError(f"{peer}: {error}") from None


def _refuse_two_sources(plan: SharingPlan, peer: str) -> None:
    for layer, (key, value) in enumerate(zip(plan.key_sources, plan.value_sources, strict=True)):
        if key != value:
            raise UserError(
                f"{peer}: layer {layer} reads the keys of layer {key} and the values of layer {value}, "
                "but a layer has one source for both"
            )


def _refuse_windows(plan: SharingPlan, peer: str) -> None:
    for layer, window in enumerate(plan.windows):
        if window is not None:
            raise UserError(f"{peer}: layer {layer} has a window of {window}, but there are no windows")


def _one_window(plan: SharingPlan, peer: str) -> int | None:
    """The window of all windowed layers, None when there are none."""
    first = next((window for window in plan.windows if window is not None), None)
    for layer, window in enumerate(plan.windows):
        if window not in (None, first):
            raise UserError(
                f"{peer}: layer {layer} has a window of {window} after one of {first}, but there is one size"
            )
    return first


def _refuse_sources_above(plan: SharingPlan, peer: str) -> None:
    for layer in plan.readers_below_owner:
        source = max(plan.key_sources[layer], plan.value_sources[layer])
        raise UserError(f"{peer}: layer {layer} reads layer {source} above it, but layers run in order")


def _refuse_difference(plan: SharingPlan, read_back: SharingPlan, peer: str, rule: str) -> None:
    """Refuse when what was written means another plan, at the first layer that differs."""
    for layer, (source, other) in enumerate(zip(plan.key_sources, read_back.key_sources, strict=True)):
        if source != other:
            raise UserError(f"{peer}: layer {layer} reads layer {source}, but {rule}: it would read layer {other}")


def _get(config: Config, key: str, peer: str) -> Any:
    if config.get(key) is None:
        raise UserError(f"{peer}: {key} is missing from the config")
    return config[key]


def _positive(config: Config, key: str, peer: str) -> int:
    value = _get(config, key, peer)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{peer}: {key} must be a positive whole number, got {value!r}")
    return value


def _integers(config: Config, key: str, peer: str) -> list[int]:
    values = _get(config, key, peer)
    if not isinstance(values, list | tuple) or not all(isinstance(value, int) for value in values):
        raise UserError(f"{peer}: {key} must be a list of layer numbers, got {values!r}")
    return list(values)


def _check_depth(config: Config, length: int, key: str, peer: str) -> None:
    layers = config.get("num_hidden_layers", length)
    if layers != length:
        raise UserError(f"{peer}: {key} describes {length} layers, but num_hidden_layers is {layers}")
