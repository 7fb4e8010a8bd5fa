"""Exams compared item by item, and the pages that show them."""

import json
import re

import numpy as np
import pytest

from unirl.evaluation.exam import exam_rows, means_of, metric_names, scores_of
from unirl.evaluation.intervals import bounded_interval
from unirl.evaluation.sft_report import write_sft_report
from unirl.evaluation.stages_report import Stage, write_stages_report


def item(name, subset="editing", **scores):
    reply = [{"text": "<b>so</b> draw it"}, {"image": "evaluations/images/x.webp"}]
    return {"id": name, "subset": subset, "scores": scores, "prompt": [{"text": "draw"}], "reply": reply}


BEFORE = {"items": [item("a", exact=0.0, right=1.0), item("b", exact=0.0, right=None), item("c", exact=1.0, right=0.0)]}
AFTER = {"items": [item("a", exact=1.0, right=1.0), item("b", exact=1.0, right=1.0), item("c", exact=1.0, right=None)]}


def test_gains_are_of_the_same_items():
    (exact,) = exam_rows(BEFORE, AFTER)
    assert exact.metric == "editing/exact"
    assert exact.num == 3
    assert exact.before[0] == pytest.approx(1 / 3)
    assert exact.after[0] == 1.0
    assert exact.gain == pytest.approx((2 / 3, *bounded_interval(np.array([1.0, 1.0, 0.0]), -1.0, 1.0)))
    assert exact.gain[2] <= 1.0


def test_a_gain_of_nothing_has_an_interval_that_narrows_with_the_items():
    def gain(num):
        exam = {"items": [item(str(n), exact=float(n % 2)) for n in range(num)]}
        (row,) = exam_rows(exam, exam)
        return row.gain

    # t^2 / (t^2 + n), Student's t for 3 and 39 degrees of freedom being 3.182 and 2.023.
    for num, most in ((4, 0.717), (40, 0.0928)):
        assert gain(num) == pytest.approx((0.0, -most, most), abs=1e-3)


def test_a_metric_that_judged_fewer_than_two_of_the_same_items_is_left_out():
    assert metric_names(BEFORE) == ["editing/exact", "editing/right"]
    assert [row.metric for row in exam_rows(BEFORE, AFTER)] == ["editing/exact"], "right: only a was judged twice"


def test_what_was_not_judged_counts_for_nothing():
    assert scores_of(BEFORE, "editing/right") == {"a": 1.0, "c": 0.0}
    assert means_of(BEFORE)["editing/right"][0] == 0.5


def test_the_page_of_a_run_shows_exam_curves_and_replies(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"id": "r", "status": "finished", "attempt": 0}))
    lines = [{"step": s, "sft/nats/text": 2.0 / s, "sft/nats/image": 3.0, "time/step_s": 1.0} for s in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for step, exam in ((0, BEFORE), (29, AFTER)):
        (folder / f"exam_{step:06d}.json").write_text(json.dumps(exam))
        (folder / f"heldout_{step:06d}.json").write_text(json.dumps({"sft/nats/text": 1.0 + step}))
    page = write_sft_report(tmp_path).read_text()
    assert "+0.667" in page
    assert "Cross-entropy of a target" in page
    assert "text, held out" in page
    assert "&lt;b&gt;so&lt;/b&gt; draw it" in page
    assert 'src="evaluations/images/x.webp"' in page
    assert '<table class="replies">' in page
    (cells,) = re.findall(r"\.replies th, \.replies td {(.*?)}", page)
    assert "text-align: left; white-space: normal" in cells, "long replies wrap, headings stand above them"
    assert "either way" in page


def test_the_page_of_a_run_without_an_exam_is_made(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"id": "r", "status": "failed", "attempt": 0}))
    assert "<html" in write_sft_report(tmp_path).read_text()


def test_stages_stand_side_by_side(tmp_path):
    stages = [
        Stage(label="base", means={"drawing/exact": (0.1, 0.0, 0.2)}),
        Stage(
            label="after <both>", means={"drawing/exact": (0.5, 0.4, 0.6), "asking/right": (1.0, 1.0, 1.0)}, link="x"
        ),
    ]
    page = write_stages_report(tmp_path, "two", stages, notes=["mind the gap"]).read_text()
    assert page.index("asking") < page.index("drawing")
    assert "0.100<small>0.000 to 0.200" in page
    assert "<td>right</td><td></td><td>1.000" in page
    assert "after &lt;both&gt;" in page
    assert "mind the gap" in page
