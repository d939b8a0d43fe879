"""SharingPlan: which layer's keys and values each layer reads, and how far back it looks.

The plan is data. Which layers own K/V projections, how many cache slots there are, where prefill may stop and where
a pipeline may be cut are all derived from it here, once, and nowhere configured a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from crosslayer.errors import UserError

SlotKind = Literal["key", "value"]

# Passes over layers of which some read a layer above them: without gradients, and then with. With one of these, the
# readers would teach the owner nothing (Layer-Condensed KV, arXiv 2405.10637, whose numbers these are).
PASSES, PASSES_WITH_GRADIENT = 7, 2


@dataclass(frozen=True)
class Slot:
    """One stored stream of keys or of values: written once per token by `owner`, attended to by `readers`.

    `window` is how many of the newest tokens any reader may look at (the largest window among the readers), or None
    when a reader attends to the whole context.
    """

    kind: SlotKind
    owner: int
    readers: tuple[int, ...]
    window: int | None

    def capacity(self, context: int) -> int:
        """Tokens that must be stored when `context` tokens have been seen."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class SharingPlan:
    """Per layer: the layer whose keys it reads, the layer whose values it reads, and its attention window.

    Layers count from 0. A layer that is its own source owns a projection and a slot; every other layer must name an
    owner. A window of W lets a token attend to itself and the W-1 tokens before it; None means the whole context.

    A source above its reader (Layer-Condensed KV, arXiv 2405.10637) is a valid plan; see `readers_below_owner`.

    Raises:
        UserError: the three sequences differ in length, a source is out of range or owns nothing, or a window is not
            positive. The message names the layer.
    """

    key_sources: tuple[int, ...]
    value_sources: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = field(default=())

    def __post_init__(self) -> None:
        keys = tuple(self.key_sources)
        object.__setattr__(self, "key_sources", keys)
        object.__setattr__(self, "value_sources", tuple(self.value_sources) or keys)
        object.__setattr__(self, "windows", tuple(self.windows) or (None,) * len(keys))
        if not keys:
            raise UserError("a sharing plan needs at least one layer")
        for name in ("value_sources", "windows"):
            if len(getattr(self, name)) != len(keys):
                raise UserError(f"key_sources has {len(keys)} layers but {name} has {len(getattr(self, name))}")
        _check_sources("key", self.key_sources)
        _check_sources("value", self.value_sources)
        for layer, window in enumerate(self.windows):
            if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
                raise UserError(f"layer {layer}: window must be a positive number of tokens or null, got {window!r}")

    # -- the shape of the plan ---------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.key_sources)

    def owns_keys(self, layer: int) -> bool:
        return self.key_sources[layer] == layer

    def owns_values(self, layer: int) -> bool:
        return self.value_sources[layer] == layer

    @cached_property
    def key_owners(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.key_sources)))

    @cached_property
    def value_owners(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.value_sources)))

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Layers that own keys, values, or both."""
        return tuple(sorted({*self.key_sources, *self.value_sources}))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every stored stream: the key slots by owner, then the value slots by owner."""
        return (*self._slots_of("key", self.key_sources), *self._slots_of("value", self.value_sources))

    @cached_property
    def key_slots(self) -> dict[int, Slot]:
        """Key slots by owner."""
        return {slot.owner: slot for slot in self.slots if slot.kind == "key"}

    @cached_property
    def value_slots(self) -> dict[int, Slot]:
        """Value slots by owner."""
        return {slot.owner: slot for slot in self.slots if slot.kind == "value"}

    def _slots_of(self, kind: SlotKind, sources: Sequence[int]) -> Iterable[Slot]:
        for owner in sorted(set(sources)):
            readers = tuple(layer for layer, source in enumerate(sources) if source == owner)
            windows = [w for r in readers if (w := self.windows[r]) is not None]
            yield Slot(kind, owner, readers, max(windows) if len(windows) == len(readers) else None)

    def shares_slot(self, layer: int) -> bool:
        """Whether `layer` owns keys or values that another layer reads too."""
        return any(
            slot is not None and len(slot.readers) > 1
            for slot in (self.key_slots.get(layer), self.value_slots.get(layer))
        )

    # -- derived facts -----------------------------------------------------------------------------------------

    @property
    def is_identity(self) -> bool:
        """Every layer reads its own keys and values (windows aside)."""
        return len(self.key_owners) == len(self.value_owners) == self.num_layers

    @property
    def unshared(self) -> SharingPlan:
        """The same windows with every layer reading its own keys and values: what this plan is compared to."""
        return SharingPlan(tuple(range(self.num_layers)), windows=self.windows)

    @cached_property
    def readers_below_owner(self) -> tuple[int, ...]:
        """Layers that read a layer above themselves; such a plan cannot run in one pass over the layers."""
        pairs = zip(self.key_sources, self.value_sources, strict=True)
        return tuple(layer for layer, sources in enumerate(pairs) if max(sources) > layer)

    @cached_property
    def loops(self) -> tuple[range, ...]:
        """The layers that need several passes, bottom to top: each run goes from a reader below its owner to that
        owner, and runs that overlap are one."""
        sources = [max(pair) for pair in zip(self.key_sources, self.value_sources, strict=True)]
        joined: list[range] = []
        for layer in self.readers_below_owner:
            if joined and layer < joined[-1].stop:
                joined[-1] = range(joined[-1].start, max(joined[-1].stop, sources[layer] + 1))
            else:
                joined.append(range(layer, sources[layer] + 1))
        return tuple(joined)

    def layers_run(self, passes: int) -> list[int]:
        """All layers, and those that need several passes `passes` times."""
        return [*range(self.num_layers), *[layer for loop in self.loops for layer in loop] * (passes - 1)]

    @property
    def prefill_cut(self) -> int:
        """The number of lower layers that fill every slot: 1 + the last owner.

        Layers from here on write no slot, so prefill needs them only for tokens whose logits are asked for (YOCO,
        arXiv 2405.05254). With a reader below its owner there is no such saving and this is the number of layers.
        """
        return self.num_layers if self.readers_below_owner else 1 + self.owners[-1]

    @cached_property
    def pipeline_cuts(self) -> tuple[int, ...]:
        """Legal places to cut the layers into pipeline stages without sending keys or values along.

        A cut at c puts layers 0..c-1 on one stage and c.. on the next.
        """
        pairs = list(zip(self.key_sources, self.value_sources, strict=True))
        return tuple(
            cut
            for cut in range(1, self.num_layers)
            if all((source >= cut) == (layer >= cut) for layer, pair in enumerate(pairs) for source in pair)
        )

    @property
    def layer_groups(self) -> tuple[range, ...]:
        """The layers between two legal cuts, bottom to top: none reads a layer outside its group."""
        bounds = (0, *self.pipeline_cuts, self.num_layers)
        return tuple(range(start, stop) for start, stop in pairwise(bounds))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of layers that read each key slot, by owner."""
        return tuple(len(slot.readers) for slot in self.key_slots.values())

    # -- as data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, list[int] | list[int | None]]:
        return {
            "key_sources": list(self.key_sources),
            "value_sources": list(self.value_sources),
            "windows": list(self.windows),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharingPlan:
        """The inverse of `to_dict`; `value_sources` and `windows` may be left out.

        Raises:
            UserError: a key is missing or unknown, or a value is not a list of layer numbers.
        """
        if unknown := set(data) - {"key_sources", "value_sources", "windows"}:
            raise UserError(f"sharing plan: unknown key {sorted(unknown)[0]!r}")
        if "key_sources" not in data:
            raise UserError("sharing plan: key_sources is missing")
        for name, values in data.items():
            if not isinstance(values, Sequence) or isinstance(values, str):
                raise UserError(f"sharing plan: {name} must be a list, got {values!r}")
        return cls(*(tuple(data.get(name, ())) for name in ("key_sources", "value_sources", "windows")))

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SharingPlan:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"sharing plan: not JSON: {error}") from None
        if not isinstance(data, dict):
            raise UserError("sharing plan: the JSON must be an object with key_sources, value_sources, windows")
        return cls.from_dict(data)

    def __str__(self) -> str:
        """The explicit short form that `parse_plan` reads back: `0,0,2@512,2`, keys/values where they differ."""

        def listed(sources: Sequence[int]) -> str:
            return ",".join(
                str(source) if window is None else f"{source}@{window}"
                for source, window in zip(sources, self.windows, strict=True)
            )

        if self.value_sources == self.key_sources:
            return listed(self.key_sources)
        return f"{listed(self.key_sources)}/{','.join(map(str, self.value_sources))}"

    @classmethod
    def from_list(cls, text: str) -> SharingPlan:
        """Read the explicit form that `str` writes, such as `0,0,2@512,2` or `0,1,1,1/0,1,0,0`.

        Raises:
            UserError: an entry is not a layer number, optionally with `@window`.
        """
        keys, slash, values = text.partition("/")
        key_entries = [_entry(item) for item in keys.split(",")]
        value_entries = [_entry(item) for item in values.split(",")] if slash else key_entries
        if slash and any(window is not None for _, window in value_entries):
            raise UserError(f"plan {text!r}: windows belong to the key list, before the slash")
        return cls(
            tuple(source for source, _ in key_entries),
            tuple(source for source, _ in value_entries),
            tuple(window for _, window in key_entries),
        )


def _entry(item: str) -> tuple[int, int | None]:
    source, at, window = item.strip().partition("@")
    try:
        return int(source), int(window) if at else None
    except ValueError:
        raise UserError(f"plan entry {item!r}: want a layer number, or layer@window") from None


def _check_sources(kind: str, sources: Sequence[int]) -> None:
    for layer, source in enumerate(sources):
        if not isinstance(source, int) or isinstance(source, bool):
            raise UserError(f"layer {layer}: {kind} source must be a layer number, got {source!r}")
        if not 0 <= source < len(sources):
            raise UserError(f"layer {layer}: {kind} source {source} is outside the plan's {len(sources)} layers")
        if sources[source] != source:
            raise UserError(
                f"layer {layer} reads the {kind}s of layer {source}, but layer {source} owns none: "
                f"it reads layer {sources[source]}"
            )
