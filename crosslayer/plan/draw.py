"""A plan as text, in the manner of the paper's figures: one row a layer, a line from each reader to the owner it reads.

layer
  0   ■─┐      layers 0 and 1 read the keys and values that layer 0 makes
  1   □─┘
  2   ■        layer 2 keeps its own to itself
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from crosslayer.plan.sharing import SharingPlan, Slot

OWNER, READER = "■", "□"
MAX_ROWS = 36  # more layers than this are drawn in several columns, so that a plan fits one screen


def draw(plan: SharingPlan) -> str:
    """The drawing, without a newline at the end. Keys and values are drawn apart where their sources differ."""
    lines = [_summary(plan), ""]
    width = len(str(plan.num_layers - 1))
    title = "layer".rjust(max(width, 5))
    rows = [str(layer).rjust(len(title)) for layer in range(plan.num_layers)]
    parts = [("", plan.key_slots)]
    if plan.key_sources != plan.value_sources:
        parts = [("keys", plan.key_slots), ("values", plan.value_slots)]
    for name, slots in parts:
        buses = _buses(list(slots.values()), plan.num_layers)
        part_width = max(len(name), *map(len, buses))
        title += "  " + name.ljust(part_width)
        rows = [f"{row}  {bus.ljust(part_width)}" for row, bus in zip(rows, buses, strict=True)]
    if len(set(plan.windows)) > 1:
        title += "  window"
        rows = [row + (f"  {w:>6}" if w else "") for row, w in zip(rows, plan.windows, strict=True)]
    return "\n".join([*lines, *_columns(title, rows), *_notes(plan)])


def _summary(plan: SharingPlan) -> str:
    owners, layers = len(plan.owners), plan.num_layers
    if owners == layers:
        return f"{layers} layers, each with keys and values of its own ({OWNER})"
    kept = "keys or values" if plan.key_sources != plan.value_sources else "keys and values"
    return f"{layers} layers: {owners} own {kept} ({OWNER}), {layers - owners} only read another layer's ({READER})"


def _notes(plan: SharingPlan) -> list[str]:
    notes = []
    windows = set(plan.windows)
    if windows != {None} and len(windows) == 1:
        notes.append(f"Every layer attends to a window of {plan.windows[0]} tokens.")
    if plan.readers_below_owner:
        first = plan.readers_below_owner[0]
        notes.append(f"Layer {first} reads a layer above it: this plan cannot run in one pass over the layers.")
    elif plan.prefill_cut < plan.num_layers:
        notes.append(f"Prefill fills the whole cache with layers 0 to {plan.prefill_cut - 1}.")
    return ["", *notes] if notes else []


def _buses(slots: Sequence[Slot], layers: int) -> list[str]:
    """For each layer its mark, and the lines that tie it to the layers that read the same slot.

    Slots that overlap get lines of their own, side by side; shorter ones are further in, so that few lines cross.
    """
    mark = [READER] * layers
    for slot in slots:
        mark[slot.owner] = OWNER
    shared = sorted((s for s in slots if len(s.readers) > 1), key=lambda s: (s.readers[-1] - s.readers[0], s.owner))
    lanes: list[list[Slot]] = []
    for slot in shared:
        free = (lane for lane in lanes if not any(_overlap(slot, other) for other in lane))
        lane = next(free, None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(slot)
    return [mark[layer] + _lines(layer, lanes) for layer in range(layers)]


def _overlap(a: Slot, b: Slot) -> bool:
    return a.readers[0] <= b.readers[-1] and b.readers[0] <= a.readers[-1]


def _lines(layer: int, lanes: list[list[Slot]]) -> str:
    """The lines right of one layer's mark: two characters a lane, joining those of the slot that the layer reads."""
    passing = [next((s for s in lane if s.readers[0] <= layer <= s.readers[-1]), None) for lane in lanes]
    joined = next((i for i, slot in enumerate(passing) if slot is not None and layer in slot.readers), -1)
    text = ""
    for i, slot in enumerate(passing):
        text += "─" if i <= joined else " "
        if slot is None:
            text += "─" if i < joined else " "
        elif i != joined:
            text += "┼" if i < joined else "│"
        else:
            text += {slot.readers[0]: "┐", slot.readers[-1]: "┘"}.get(layer, "┤")
    return text.rstrip()


def _columns(title: str, rows: list[str]) -> list[str]:
    """The rows under their title, folded into columns of nearly equal height where there are more than MAX_ROWS."""
    count = -(-len(rows) // MAX_ROWS)
    height = -(-len(rows) // count)
    columns = [[title, *rows[start : start + height]] for start in range(0, len(rows), height)]
    width = max(len(row) for column in columns for row in column)
    lines = zip_longest(*columns, fillvalue="")
    return ["    ".join(cell.ljust(width) for cell in line).rstrip() for line in lines]
