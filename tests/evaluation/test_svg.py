"""Plots are legible: labels never overlap, ticks are round."""

import random
from itertools import combinations

import pytest

from tokenry.evaluation.svg import Bar, Box, Point, bars, place_labels, scatter, ticks

FRAME = Box(60, 16, 840, 420)


@pytest.mark.parametrize("seed", range(12))
def test_labels_never_overlap_and_all_find_a_place(seed):
    rng = random.Random(seed)
    # Lossless methods share one quality, so many points lie on one line.
    points = [(rng.uniform(80, 820), rng.choice([60.0, 60.0, rng.uniform(30, 400)])) for _ in range(16)]
    labels = ["x" * rng.randint(4, 34) for _ in points]
    boxes = place_labels(points, labels, FRAME)
    assert all(boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    assert not any(box.overlaps(dot) for box in boxes for dot in dots)
    assert all(box.inside(FRAME) for box in boxes)


def test_a_lone_label_stands_beside_its_point():
    (box,) = place_labels([(400, 200)], ["plain"], FRAME)
    assert 400 < box.left < 415 and box.top < 200 < box.bottom


def test_a_label_without_room_is_left_out():
    assert place_labels([(5, 5)], ["a very long label"], Box(0, 0, 10, 10)) == [None]


def test_ticks_are_round_and_within():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.31, 2.2, 4) == [0.5, 1, 1.5, 2]
    assert ticks(3, 3) == [3]


def test_plots_hold_their_labels_escaped():
    plot = scatter([Point(1.0, 0.5, "a<b>", "f-peers"), Point(1.0, 0.5, "c", "f-kvcache")], "x", "y", mark_x=1.0)
    assert "a&lt;b&gt;" in plot and "a<b>" not in plot and plot.endswith("</svg>")
    plot = bars([Bar(0.0, 0.0, 0.0, "zero", "0", "f-peers")], "memory")
    assert "zero" in plot and "nan" not in plot
