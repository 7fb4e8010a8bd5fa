import random
import re
from xml.etree import ElementTree

from tests.monitoring.made_run import make_pair
from unirl.data.pair_report import render_report
from unirl.data.pair_store import PairSet


def test_histograms_name_both_axes_and_count_in_whole_pairs():
    rng = random.Random(0)
    pairs = tuple(make_pair(f"p{index}", rng) for index in range(40))
    retrieved = [pair.similarity for pair in pairs if pair.kind == "retrieved"]
    page = render_report(PairSet(pairs=pairs, weights=tuple(p.similarity for p in pairs), settings={}), title="made")
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    for svg, name in zip(figures, ("similarity s", "weight w"), strict=True):
        heights = [int(bar.find("title").text.split(": ")[1]) for bar in svg.iter("rect")]
        assert sum(heights) == len(retrieved)
        texts = [text.text for text in svg.iter("text")]
        assert {name, "number of pairs", "0", str(max(heights)), "0.0", "1.0"} <= set(texts)
        tallest = min(svg.iter("rect"), key=lambda bar: float(bar.get("y")))
        mark = next(text for text in svg.iter("text") if text.text == str(max(heights)))
        assert abs(float(mark.get("y")) - 4 - float(tallest.get("y"))) <= 1


def test_an_empty_set_still_has_a_page():
    page = render_report(PairSet(pairs=(), weights=(), settings={}), title="none")
    assert "number of pairs" in page
