"""The plots of made-up results: what is drawn where, and that no label covers another."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.text import Annotation

from crosslayer.compare.plots import draw_curves, draw_pareto
from tests.compare.made_up import made_up

CROWDED = {
    "H32-MQA": (768, [3.50, 3.51, 3.52]),
    "H32-MQA-CLA2": (384, [3.52, 3.53, 3.53]),
    "H16-MQA": (384, [3.51, 3.52, 3.54]),
    "H32-MQA-CLA3": (256, [3.53, 3.56, 3.54]),
    "H32-MQA-CLA2-KeepEnds": (512, [3.52, 3.55, 3.53]),
    "H64-MQA-CLA2": (768, [3.50, 3.52, 3.51]),
    "H32-MQA-yoco:window=64": (448, [3.55, 3.58, 3.56]),
}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_labels_of_the_pareto_plot_are_apart(count: int) -> None:
    figure = draw_pareto(made_up(dict(list(CROWDED.items())[:count])))
    (axes,) = figure.axes
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert [label.get_text().partition("\n")[0] for label in labels] == list(CROWDED)[:count]
    for a, b in combinations(labels, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent()), f"{a.get_text()} covers {b.get_text()}"
    for label in labels:
        box = label.get_window_extent()
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert axes.bbox.y0 <= box.y0 <= box.y1 <= axes.bbox.y1


def test_pareto_plot_shows_means_and_says_what_is_not_resolved() -> None:
    figure = draw_pareto(made_up({"A": (768, [3.0, 3.5]), "B": (384, [3.1, 3.7]), "C": (192, [4.0, 4.5])}))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == "linear"
    assert [(label.xy[0], pytest.approx(label.xy[1])) for label in axes.texts] == [(768, 3.25), (384, 3.4), (192, 4.25)]
    assert [label.get_text() for label in axes.texts] == ["A", "B\n+0.1500 ±0.6353\nnot resolved", "C\n+1.0000 ±0.0000"]


def test_curves_show_the_difference_to_the_first_design() -> None:
    left, right = draw_curves(made_up({"A": (768, [3.0, 3.5]), "B": (384, [3.1, 3.7])})).axes
    ends = [line.get_ydata()[-1] for line in left.lines if line.get_marker() != "None"]
    assert ends == [pytest.approx(3.25), pytest.approx(3.4)]
    assert [line.get_ydata().tolist() for line in right.lines] == [[0, 0], [pytest.approx(0.15), pytest.approx(0.15)]]
