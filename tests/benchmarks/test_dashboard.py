"""The dashboard's benchmark at a small size: what it measures, never how fast."""

import time

from unirl.benchmarks.dashboard import DashboardBench, measure_dashboard
from unirl.benchmarks.dashboard_run import METRICS, LongRun, write_long_run
from unirl.benchmarks.report import Goal
from unirl.monitoring.metrics import lookup
from unirl.run_files import read_lines


def test_the_made_run_is_one_that_readers_take(tmp_path):
    size = LongRun(num_steps=60, num_pairs=20, pairs_per_step=4)
    run = write_long_run(tmp_path / "long", size, time.time())
    metrics, bad = read_lines(run / "metrics.jsonl")
    assert (len(metrics), bad) == (60, 0)
    assert len(METRICS) == len(set(METRICS)) == 30
    assert metrics[-1].keys() == {"v", "step", "time", "attempt", *METRICS}
    pairs, _ = read_lines(run / "pairs.jsonl")
    assert len({(pair["step"], pair["pair_id"]) for pair in pairs}) == 20
    used = {
        line["step"]: [pair["pair_id"] for pair in line["pairs"]] for line in read_lines(run / "used_pairs.jsonl")[0]
    }
    for pair in pairs:
        assert pair["pair_id"] in used[pair["step"]]
        names = [pair["understanding"]["image"], *(sample["image"] for sample in pair["generation"]["samples"])]
        assert all((run / "images" / name).is_file() for name in names)


def test_known_metrics_are_in_the_table():
    for name in METRICS:
        if name != "learner/grad_cosine":
            lookup(name)


def test_a_small_run_is_measured_whole():
    rows = [{"figure": "page", "value": 1.0}]
    asked = []

    def browser(url, run_dir):
        asked.append((url[:17], (run_dir / "run.json").is_file()))
        return rows, [Goal(text="drawn, s", wanted=3, got=1, at_most=True)]

    size = LongRun(num_steps=40, num_pairs=12, pairs_per_step=4)
    report = measure_dashboard(DashboardBench(run=size, num_switches=3, num_polls=2, browser=browser))
    figures = {row["figure"]: row["value"] for row in report.tables[0].rows}
    assert all(value > 0 for value in figures.values())
    assert report.tables[1].rows == rows
    assert asked == [("http://127.0.0.1:", True)]
    assert [goal.wanted for goal in report.goals] == [3.0, 0.3, 5000.0, 120.0, 3]
