"""Bytes and large numbers as people write and read them."""

from __future__ import annotations

import math
import re

from crosslayer.errors import UserError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("B", "KB", "MB", "GB", "TB", "PB")


def parse_bytes(text: str) -> int:
    """The number of bytes in a text such as `80GiB` (1024s), `80 GB` (1000s) or `4096`.

    Raises:
        UserError: no number or one beyond any memory, or a unit that is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    sizes: dict[str, int] = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
    sizes |= {unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL)}
    if match is None or (match[2] or "b") not in sizes:
        raise UserError(f"memory {text!r}: want a number and a unit, such as 80GiB or 80GB")
    size = float(match[1]) * sizes[match[2] or "b"]
    if math.isinf(size):
        raise UserError(f"memory {text!r}: more bytes than can be counted with")
    return round(size)


def format_bytes(count: int) -> str:
    """Three digits and a unit in 1024s: 3600 is `3.52 KiB`."""
    return _scaled(count, 1024, _BINARY)


def format_flops(count: int) -> str:
    """Three digits and a unit in 1000s: 2389786624 is `2.39 G`."""
    return _scaled(count, 1000, ("", "K", "M", "G", "T", "P", "E", "Z"))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(count) >= base and power < len(units) - 1:
        count, power = count / base, power + 1
    decimals = 0 if count == int(count) or abs(count) >= 100 else 1 if abs(count) >= 10 else 2
    return f"{count:,.{decimals}f} {units[power]}"
