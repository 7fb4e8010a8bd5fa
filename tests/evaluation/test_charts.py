import re
from xml.etree import ElementTree

import pytest

from unirl.evaluation.charts import HEIGHT, MAX_POINTS, WIDTH, Line, histogram, line_chart, smooth, stacked_bar, thin


def svg_of(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure).group())


def points_of(svg, tag="polyline"):
    return [[tuple(map(float, p.split(","))) for p in shape.get("points").split()] for shape in svg.iter(tag)]


def test_a_line_runs_left_to_right_and_more_is_higher():
    svg = svg_of(line_chart("t", [Line(label="a", points=[(0, 1.0), (5, 2.0), (10, 3.0)], color="und")]))
    ((first, middle, last),) = points_of(svg)
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1]
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [1e-13, 3e-13], [-4.0, 1e6], [1.0]])
def test_any_values_stay_inside_the_figure(values):
    line = Line(label="a", points=list(enumerate(values)), color="a", band=[(0, min(values), max(values))])
    svg = svg_of(line_chart("t", [line]))
    for shape in points_of(svg) + points_of(svg, "polygon"):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in shape)
    assert len(list(svg.iter("text"))) >= 3


@pytest.mark.parametrize("last", [1, 2, 3, 4, 7, 60, 12_345])
def test_steps_are_marked_at_whole_numbers(last):
    svg = svg_of(line_chart("t", [Line(label="a", points=[(step, 0.5) for step in range(1, last + 1)], color="a")]))
    marks = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert 2 <= len(marks) <= 9
    assert len(set(marks)) == len(marks)
    assert all(float(mark).is_integer() for mark in marks)


def test_a_histogram_counts_in_whole_pairs_and_names_its_values():
    svg = svg_of(histogram("t", {"a": ("a", [0.5, 0.52])}, "weight"))
    texts = {text.text for text in svg.iter("text")}
    assert {"0", "1", "2", "weight"} <= texts
    assert not texts & {"0.5", "1.5"}


@pytest.mark.parametrize(
    "values", [[1 - 4e-6, 1.0, 1 + 5e-6], [1.2e-13, 3e-13], [0.0, 7e-5], [0.3, 0.30000000000000004]]
)
def test_marks_of_the_y_axis_differ(values):
    svg = svg_of(line_chart("t", [Line(label="a", points=list(enumerate(values)), color="a")]))
    marks = [text.text for text in svg.iter("text") if text.get("text-anchor") == "end"][:-1]
    assert 3 <= len(set(marks)) == len(marks)


def test_the_axis_grows_to_hold_the_wanted_range():
    svg = svg_of(line_chart("t", [Line(label="a", points=[(0, 0.1), (1, 0.2)], color="a")], y_range=(0.0, 1.0)))
    assert {"0.0", "1.0"} <= {text.text for text in svg.iter("text")}


def test_nothing_to_show_gives_no_figure():
    assert line_chart("t", [Line(label="a", points=[], color="a")]) == ""
    assert histogram("t", {"a": ("a", [])}, "weight") == ""
    assert stacked_bar({}, "s") == ""


def test_labels_are_escaped():
    figure = line_chart("<b>&", [Line(label="<i>", points=[(0, 1)], color="a")] * 2, note="</svg>")
    assert "<b>" not in figure
    assert "<i>" not in figure
    assert figure.count("</svg>") == 1


def test_bars_hold_every_value_once():
    figure = histogram("t", {"a": ("a", [0.0, 0.5, 1.0, 1.0]), "b": ("b", [0.52])}, "weight", bins=10)
    counts = [int(c) for c in re.findall(r": (\d+)</title>", figure)]
    assert sum(counts) == 5
    svg = svg_of(figure)
    assert all(float(bar.get("height")) > 0 for bar in svg.iter("rect"))


def test_shares_of_a_stacked_bar_add_up():
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", stacked_bar({"rollout": 3.0, "update": 1.0}, "s"))]
    assert widths == [75.0, 25.0]


def test_long_runs_are_thinned_to_means_of_neighbours():
    points = thin([(step, float(step % 2)) for step in range(20_000)])
    assert len(points) <= MAX_POINTS
    assert all(abs(y - 0.5) < 0.02 for _, y in points)
    assert points[-1][0] == 19_999


def test_smoothing_averages_what_is_there():
    assert smooth([(1, 1.0), (2, 2.0), (3, 6.0)], 2) == [(1, 1.0), (2, 1.5), (3, 4.0)]
