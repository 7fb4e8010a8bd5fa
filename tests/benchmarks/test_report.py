import json

import pytest

from unirl.benchmarks import report
from unirl.benchmarks.report import Goal, Report, Table, median_ratio, read_report, results_page, shown, take_turns


def made(name="speed"):
    return Report(
        name=name,
        command=f"unirl bench {name}",
        tables=[Table(title="four rows", rows=[{"arm": "loop", "s": 2.0}, {"arm": "ours", "s": 1.25}])],
        goals=[Goal(text="faster", wanted=2, got=1.6), Goal(text="waste", wanted=0.03, got=0.01, at_most=True)],
        limits=["Products take the rest."],
        machine={"cores": 2, "torch": "2.13"},
    )


def test_a_goal_is_met_from_the_side_that_it_names():
    assert [goal.met for goal in made().goals] == [False, True]
    assert str(made().goals[0]) == "MISSED: faster: 1.6, wanted >= 2"
    assert str(made().goals[1]) == "met: waste: 0.01, wanted <= 0.03"


def test_text_json_and_page_say_the_same():
    text = made().as_text()
    assert text.splitlines()[:3] == ["four rows     s", "loop          2", "ours       1.25"]
    assert [goal["met"] for goal in json.loads(made().as_json())["goals"]] == [False, True]


def test_a_saved_report_comes_back_and_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "docs" / "results")
    monkeypatch.setattr(report, "PAGE", tmp_path / "docs" / "results.md")
    with pytest.raises(FileNotFoundError, match="expected a checkout"):
        made().save()
    (tmp_path / "docs").mkdir()
    assert read_report(made("b").save()) == made("b")
    made("a").save()
    page = results_page(tmp_path / "docs" / "results")
    assert (tmp_path / "docs" / "results.md").read_text() == page
    assert page.index("## a") < page.index("## b")
    assert "| ours | 1.25 |" in page
    assert "- MISSED: faster: 1.6, wanted >= 2\n- met" in page


def test_the_page_of_the_docs_is_current_and_names_no_place():
    text = report.PAGE.read_text()
    assert text == results_page()
    assert "/home" not in text
    assert "/tmp" not in text


def test_arms_take_turns_and_the_first_round_may_warm_up():
    called = []
    arms = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    assert [len(values) for values in take_turns(arms, 2).values()] == [2, 2]
    assert called == ["a", "b"] * 3
    take_turns(arms, 1, warm=False)
    assert called == ["a", "b"] * 4
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_figures_keep_the_digits_that_count():
    assert [shown(value) for value in (None, "x", 3.0, 0.01234, 1234.5, 12.34)] == [
        "-",
        "x",
        "3",
        "0.0123",
        "1234",
        "12.3",
    ]
