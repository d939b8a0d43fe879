"""Random sharing plans."""

from __future__ import annotations

from hypothesis import strategies as st

from crosslayer.errors import UserError
from crosslayer.plan import SharingPlan, parse_plan

NAMED = (
    *("identity", "cla2", "cla3", "cla3:rest=last", "cla4", "cla2-keepends", "cla2-densefront", "cla2-denseback"),
    *("mlkv:1", "mlkv:2", "mlkv:3", "mixattention:4,3", "suffix:2", "suffix:3,window=4,period=2", "yoco:window=4"),
    *("pizza-bottom:3", "sandwich-middle:3", "lasagna-bottom:3", "lckv", "fusedkv-lite"),
)


@st.composite
def arbitrary_plans(draw: st.DrawFn, max_layers: int = 9) -> SharingPlan:
    """Any valid plan: sources below or above, keys and values apart or not, any windows."""
    layers = draw(st.integers(1, max_layers))

    def sources() -> tuple[int, ...]:
        owners = draw(st.lists(st.integers(0, layers - 1), min_size=1, unique=True))
        return tuple(i if i in owners else draw(st.sampled_from(owners)) for i in range(layers))

    keys = sources()
    values = sources() if draw(st.booleans()) else keys
    windows = draw(st.lists(st.none() | st.integers(1, 12), min_size=layers, max_size=layers))
    return SharingPlan(keys, values, tuple(windows))


@st.composite
def orderly_plans(draw: st.DrawFn, max_layers: int = 9) -> SharingPlan:
    """Plans that some notation can probably write: the nearest owner below, a suffix, no or one window, a design."""
    layers = draw(st.integers(1, max_layers))
    kind = draw(st.sampled_from(("nearest", "suffix", "design")))
    if kind == "design":
        try:
            return parse_plan(draw(st.sampled_from(NAMED)), layers)
        except UserError:
            kind = "nearest"
    window = draw(st.integers(1, 12))
    if kind == "suffix":
        windows = [draw(st.sampled_from((None, window))) for _ in range(layers)]
        shared = draw(st.integers(0, layers - 1))
        last = {w: i for i, w in enumerate(windows[: layers - shared])}
        sources = [i if i < layers - shared else last.get(w, i) for i, w in enumerate(windows)]
        return SharingPlan(tuple(sources), windows=tuple(windows))
    sources = [0]
    for layer in range(1, layers):
        sources.append(draw(st.sampled_from((layer, sources[-1]))))
    every = draw(st.sampled_from((None, window)))
    return SharingPlan(tuple(sources), windows=(every,) * layers)


def plans(max_layers: int = 9) -> st.SearchStrategy[SharingPlan]:
    return arbitrary_plans(max_layers) | orderly_plans(max_layers)
