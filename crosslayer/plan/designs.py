"""Named sharing designs: functions from a number of layers to a SharingPlan, and the short strings that name them.

Adding a design is one function with the `@design` line above it. Its string form is the name, optionally followed by
a colon and arguments: `cla2`, `cla3:rest=last`, `yoco:window=1024`, `suffix:12,window=512`. An explicit list such as
`0,0,2,2` works wherever a name does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from crosslayer.errors import UserError
from crosslayer.plan.sharing import SharingPlan

Build = Callable[..., SharingPlan]


@dataclass(frozen=True)
class Design:
    """A named family of plans. `pattern` is the name with `N` standing for a number, as in `claN`."""

    pattern: str
    build: Build
    source: str

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that may follow the colon (the layer count and the name's own number are not among them)."""
        parameters = list(inspect.signature(self.build, eval_str=True).parameters.items())
        return dict(parameters[2 if "N" in self.pattern else 1 :])

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n\n")[0].replace("\n", " ")


DESIGNS: list[Design] = []


def design(pattern: str, source: str) -> Callable[[Build], Build]:
    """Register a function (num_layers, [N], *, arguments) -> SharingPlan under a name, with where it comes from."""

    def register(build: Build) -> Build:
        DESIGNS.append(Design(pattern, build, source))
        return build

    return register


def parse_plan(text: str, num_layers: int) -> SharingPlan:
    """The plan that a design's short string or an explicit list names, for `num_layers` layers.

    Raises:
        UserError: no such design (the nearest name is given), an argument it does not take, a value it cannot use,
            or an explicit list of another length.
    """
    text = text.strip()
    if re.match(r"\d", text):
        plan = SharingPlan.from_list(text)
        if plan.num_layers != num_layers:
            raise UserError(f"plan {text!r} lists {plan.num_layers} layers, but the model has {num_layers}")
        return plan
    name, _, arguments = text.lower().partition(":")
    found, number = _find(name)
    values = _arguments(found, text, arguments)
    positional = (num_layers,) if number is None else (num_layers, number)
    return found.build(*positional, **values)


def _find(name: str) -> tuple[Design, int | None]:
    for candidate in DESIGNS:
        match = re.fullmatch(candidate.pattern.replace("N", r"(\d+)"), name)
        if match:
            return candidate, int(match[1]) if match.groups() else None
    known = [d.pattern for d in DESIGNS]
    if near := get_close_matches(re.sub(r"\d+", "N", name), known, n=1, cutoff=0.6):
        digits = re.search(r"\d+", name)
        raise UserError(
            f"unknown design {name!r}; did you mean {near[0].replace('N', digits[0] if digits else '2')!r}?"
        )
    raise UserError(f"unknown design {name!r}; known: {', '.join(known)}, or a list such as 0,0,2,2")


def _arguments(found: Design, text: str, arguments: str) -> dict[str, int | str]:
    parameters = found.parameters
    values: dict[str, int | str] = {}
    for position, item in enumerate(part for part in arguments.split(",") if part):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals:  # a bare value fills the design's next argument
            names = list(parameters)
            if position >= len(names):
                raise UserError(f"design {text!r}: {found.pattern} takes at most {len(names)} arguments")
            key, value = names[position], item.strip()
        if key not in parameters:
            raise UserError(f"design {text!r}: no argument {key!r}; it takes {', '.join(parameters) or 'none'}")
        if key in values:
            raise UserError(f"design {text!r}: {key} is given twice")
        if parameters[key].annotation is str:
            values[key] = value
        elif value.isdecimal() and int(value) > 0:
            values[key] = int(value)
        else:
            raise UserError(f"design {text!r}: {key} must be a positive whole number, got {value!r}")
    if missing := [n for n, p in parameters.items() if p.default is p.empty and n not in values]:
        raise UserError(f"design {text!r}: needs {missing[0]}, as in {found.pattern}:{missing[0]}=...")
    return values


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _groups(sizes: Iterable[int], source: str = "bottom") -> tuple[int, ...]:
    """Sources for consecutive groups of layers, each reading its bottom, middle (the lower of two) or top layer."""
    sources: list[int] = []
    for size in sizes:
        offset = {"bottom": 0, "middle": (size - 1) // 2, "top": size - 1}[source]
        sources += [len(sources) + offset] * size
    return tuple(sources)


def _split(layers: int, size: int, rest: str = "first") -> list[int]:
    """Group sizes that cut `layers` into groups of `size`, the incomplete one first or last."""
    _require(rest in ("first", "last"), f"rest must be first or last, got {rest!r}")
    whole, remainder = divmod(layers, size)
    groups, odd = [size] * whole, [remainder] * (remainder > 0)
    return odd + groups if rest == "first" else groups + odd


# -- Cross-Layer Attention and its variations (Brandon et al., arXiv 2405.12981) --------------------------------


@design("identity", "every layer keeps its own K and V")
def identity(num_layers: int) -> SharingPlan:
    """No sharing: the plan of MHA, GQA and MQA models."""
    return SharingPlan(tuple(range(num_layers)))


@design("claN", "Cross-Layer Attention, arXiv 2405.12981, section 3")
def cla(num_layers: int, factor: int, *, rest: str = "first") -> SharingPlan:
    """Groups of N consecutive layers read the K and V of their lowest layer.

    Where N does not divide the depth the incomplete group comes first, as in the paper's 10-layer CLA3 figure, which
    leaves layer 0 alone; `rest=last` puts it last, as Hunyuan does.
    """
    _require(factor >= 1, f"cla{factor}: the sharing factor must be at least 1")
    return SharingPlan(_groups(_split(num_layers, factor, rest)))


@design("claN-keepends", "arXiv 2405.12981, table 1 (KeepEnds)")
def keep_ends(num_layers: int, factor: int) -> SharingPlan:
    """Cross-Layer Attention between a first and a last layer that keep K and V to themselves."""
    _require(factor >= 1, f"cla{factor}-keepends: the sharing factor must be at least 1")
    _require(num_layers >= 3, f"cla{factor}-keepends: needs at least 3 layers, got {num_layers}")
    return SharingPlan(_groups([1, *_split(num_layers - 2, factor), 1]))


@design("cla2-densefront", "arXiv 2405.12981, table 1 (DenseFront)")
def dense_front(num_layers: int) -> SharingPlan:
    """The lower half owns K and V, the upper half but the last layer reads the middle, the last layer owns."""
    _require(num_layers >= 4, f"cla2-densefront: needs at least 4 layers, got {num_layers}")
    reusing = num_layers // 2 - 1
    return SharingPlan(_groups([1] * (num_layers - reusing - 2) + [1 + reusing, 1]))


@design("cla2-denseback", "arXiv 2405.12981, table 1 (DenseBack)")
def dense_back(num_layers: int) -> SharingPlan:
    """Two owners, the rest of the lower half reading the second of them, then an upper half of owners."""
    _require(num_layers >= 4, f"cla2-denseback: needs at least 4 layers, got {num_layers}")
    reusing = num_layers // 2 - 1
    return SharingPlan(_groups([1, 1 + reusing] + [1] * (num_layers - reusing - 2)))


# -- Siblings -----------------------------------------------------------------------------------------------------


@design("mlkv", "Multi-Layer Key-Value heads, arXiv 2406.09297")
def mlkv(num_layers: int, *, layers: int) -> SharingPlan:
    """`layers` KV layers, each serving an equal run of layers above it."""
    _require(num_layers % layers == 0, f"mlkv:{layers}: {layers} KV layers do not divide {num_layers} layers")
    return SharingPlan(_groups([num_layers // layers] * layers))


@design("mixattention", "MixAttention (Pairs), arXiv 2409.15012")
def mix_attention(num_layers: int, *, window: int = 1024, period: int = 6) -> SharingPlan:
    """Every `period`-th layer attends to the whole context, the rest to a window.

    Full layers share K and V in pairs; each run of windowed layers between them shares in pairs, an odd layer joining
    the last pair.
    """
    _require(period >= 2, f"mixattention: period must be at least 2, got {period}")
    sources: list[int] = []
    windows: list[int | None] = []
    for start in range(0, num_layers, period):
        full_index = start // period
        sources.append(start - period if full_index % 2 else start)
        local = min(period, num_layers - start) - 1
        pairs = [2] * (local // 2) or [local] * (local > 0)
        if local > 1:
            pairs[-1] += local % 2
        sources += [start + 1 + source for source in _groups(pairs)]
        windows += [None, *[window] * local]
    return SharingPlan(tuple(sources), windows=tuple(windows))


@design("suffix", "Gemma 3n and 4 (num_kv_shared_layers), Apple AFM 2025")
def suffix(num_layers: int, *, shared: int, window: int = 0, period: int = 5) -> SharingPlan:
    """The last `shared` layers read the last layer below them that owns K and V for the same kind of attention.

    With `window`, all but every `period`-th layer attend to a window only, and the two kinds share separately.
    """
    first = num_layers - shared
    windows = tuple(window if window and (layer + 1) % period else None for layer in range(num_layers))
    last_owner = {kind: layer for layer, kind in enumerate(windows[: max(first, 0)])}
    for layer in range(max(first, 0), num_layers):
        _require(
            windows[layer] in last_owner,
            f"suffix:{shared}: layer {layer} has no layer of its attention type below the last {shared} of "
            f"{num_layers} to read from",
        )
    sources = (layer if layer < first else last_owner[windows[layer]] for layer in range(num_layers))
    return SharingPlan(tuple(sources), windows=windows)


@design("yoco", "You Only Cache Once, arXiv 2405.05254")
def yoco(num_layers: int, *, window: int = 1024) -> SharingPlan:
    """The lower half attends to a window of its own K and V; the upper half shares one slot made at its first layer."""
    half = num_layers // 2
    _require(half >= 1, f"yoco: needs at least 2 layers, got {num_layers}")
    upper = num_layers - half
    return SharingPlan((*range(half), *[half] * upper), windows=(*[window] * half, *[None] * upper))


def _unified(shape: str, num_layers: int, kv: int, source: str) -> SharingPlan:
    """The partitions of arXiv 2410.14442: `kv` layers own K and V, the others read their block's source."""
    _require(1 <= kv <= num_layers, f"{shape}: kv must be between 1 and {num_layers} layers, got {kv}")
    if shape == "lasagna":
        whole, extra = divmod(num_layers, kv)
        return SharingPlan(_groups([whole + (i < extra) for i in range(kv)], source))
    below = kv // 2 if shape == "sandwich" else kv - 1
    above = kv - 1 - below
    return SharingPlan(_groups([1] * below + [num_layers - kv + 1] + [1] * above, source))


@design("pizza-bottom", "Cross-Layer KV Sharing, arXiv 2410.14442")
def pizza_bottom(num_layers: int, *, kv: int) -> SharingPlan:
    """The lowest kv-1 layers own; the rest share one slot made by the lowest of them."""
    return _unified("pizza", num_layers, kv, "bottom")


@design("pizza-middle", "Cross-Layer KV Sharing, arXiv 2410.14442")
def pizza_middle(num_layers: int, *, kv: int) -> SharingPlan:
    """The lowest kv-1 layers own; the rest share one slot made by the middle one, above some of its readers."""
    return _unified("pizza", num_layers, kv, "middle")


@design("sandwich-bottom", "Cross-Layer KV Sharing, arXiv 2410.14442")
def sandwich_bottom(num_layers: int, *, kv: int) -> SharingPlan:
    """The outermost kv-1 layers own; those between share one slot made by the lowest of them."""
    return _unified("sandwich", num_layers, kv, "bottom")


@design("sandwich-middle", "Cross-Layer KV Sharing, arXiv 2410.14442")
def sandwich_middle(num_layers: int, *, kv: int) -> SharingPlan:
    """The outermost kv-1 layers own; those between share one slot made by the middle one, above some of its readers."""
    return _unified("sandwich", num_layers, kv, "middle")


@design("lasagna-bottom", "Cross-Layer KV Sharing, arXiv 2410.14442")
def lasagna_bottom(num_layers: int, *, kv: int) -> SharingPlan:
    """kv consecutive groups of near-equal size, each reading its lowest layer."""
    return _unified("lasagna", num_layers, kv, "bottom")


@design("lasagna-middle", "Cross-Layer KV Sharing, arXiv 2410.14442")
def lasagna_middle(num_layers: int, *, kv: int) -> SharingPlan:
    """kv consecutive groups of near-equal size, each reading its middle layer, above some of its readers."""
    return _unified("lasagna", num_layers, kv, "middle")


@design("lckv", "Layer-Condensed KV cache, arXiv 2405.10637 (sandwich-top)")
def lckv(num_layers: int, *, warmup: int = 2) -> SharingPlan:
    """`warmup` ordinary layers around a middle whose layers all read their top layer, above most of its readers."""
    return _unified("sandwich", num_layers, warmup + 1, "top")


@design("fusedkv-lite", "FusedKV-Lite, arXiv 2512.03870")
def fusedkv_lite(num_layers: int) -> SharingPlan:
    """The upper half reads the keys of the layer below it (the middle one) and the values of the lowest layer."""
    _require(num_layers >= 2, f"fusedkv-lite: needs at least 2 layers, got {num_layers}")
    half = (num_layers + 1) // 2
    lower, upper = tuple(range(half)), num_layers - half
    return SharingPlan((*lower, *[half - 1] * upper), (*lower, *[0] * upper))
