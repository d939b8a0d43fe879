"""A figure and its standard error: how far it may be from that of all text or items like those that were scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The mean of a sample and its standard error, None for a single value."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return float(sample.mean()), None
    return float(sample.mean()), float(sample.std(ddof=1) / math.sqrt(len(sample)))


def ratio_and_error(amounts: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """sum(amounts) / sum(sizes), such as loss per token, and its standard error where whole documents (an amount and a
    size each) are the sample: first-order (delta) method. None for a single document."""
    ratio, number = float(amounts.sum() / sizes.sum()), len(amounts)
    if number < 2:
        return ratio, None
    variance = float(((amounts - ratio * sizes) ** 2).sum()) * number / (number - 1)
    return ratio, math.sqrt(variance) / float(sizes.sum())
