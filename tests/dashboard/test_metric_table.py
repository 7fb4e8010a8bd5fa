import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dashboard.conftest import add_lines
from unirl.dashboard.metric_table import MetricTable, plain, thin


def ask_for(table, names, since=None, window=(None, None), points=2000):
    table.refresh()
    return table.query(names, since=since, window=window, points=points)


def test_twenty_thousand_steps_keep_their_spikes_in_two_thousand_points(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=20_000)
    values[7777], values[15_000] = 99.0, -99.0
    add_lines(tmp_path / "metrics.jsonl", *({"step": n + 1, "time": 10.0 * n, "a": v} for n, v in enumerate(values)))
    table = MetricTable(tmp_path)
    found = ask_for(table, ["a"])
    assert found["thinned"]
    assert len(found["steps"]) <= 2000
    assert np.all(np.diff(found["steps"]) >= 0)
    assert (found["values"]["a"].max(), found["values"]["a"].min()) == (99.0, -99.0)
    assert (found["values"]["a"][0], found["values"]["a"][-1]) == (values[0], values[-1])
    at = found["steps"][found["values"]["a"].argmax()]
    assert abs(at - 7778) <= 20_000 / 1000, "within its bucket"
    window = ask_for(table, ["a"], window=(7700, 7800))
    assert not window["thinned"]
    assert window["values"]["a"].tolist() == values[7699:7800].tolist()


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=6, max_size=200),
    st.integers(4, 60),
)
def test_thinning_keeps_extremes_order_and_ends(values, points):
    column = np.array(values)
    if len(values) <= points:
        return
    picked, thinned = thin([("a", column)], len(column), points)
    kept = thinned["a"]
    assert len(kept) == len(picked) <= points
    assert np.all(np.diff(picked) >= 0)
    assert (picked[0], picked[-1]) == (0, len(column) - 1)
    assert np.array_equal(kept[[0, -1]], column[[0, -1]], equal_nan=True)
    if not np.isnan(column).all():
        assert np.nanmax(kept) == np.nanmax(column)
        assert np.nanmin(kept) == np.nanmin(column)
    assert set(kept[~np.isnan(kept)]) <= set(column[~np.isnan(column)])


def test_a_metric_that_comes_late_or_pauses_is_empty_elsewhere(tmp_path):
    add_lines(tmp_path / "metrics.jsonl", {"step": 1, "a": 1}, {"step": 2, "b": 2}, {"step": 3, "a": 3, "b": None})
    found = ask_for(MetricTable(tmp_path), ["a", "b"])["values"]
    assert [plain(found[name]) for name in "ab"] == [[1.0, None, 3.0], [None, 2.0, None]]


@pytest.mark.parametrize(
    ("times", "jumps", "shown"),
    [
        ([0, 10, 20], 0, [0, 10, 20]),
        ([0, 10, 3600 + 20, 3600 + 30], 1, [0, 10, 20, 30]),
        ([7200, 7210, 20, 30], 1, [7200, 7210, 7220, 7230]),
        ([0, 10, 5000, 20, 30], 2, [0, 10, 20, 30, 40]),
        ([0, 10, None, 30], 0, [0, 10, 10, 30]),
    ],
)
def test_the_clock_is_set_right(tmp_path, times, jumps, shown):
    lines = ({"step": n, "time": at, "attempt": 0, "time/step_s": 10.0} for n, at in enumerate(times))
    add_lines(tmp_path / "metrics.jsonl", *lines)
    table = MetricTable(tmp_path)
    assert ask_for(table, [])["times"].tolist() == shown
    assert table.skipped["clock_jumps"] == jumps


def test_the_pause_between_two_starts_is_no_jump(tmp_path):
    lines = (
        {"step": n, "time": 10.0 * n + 86400 * (n > 2), "attempt": int(n > 2), "time/step_s": 10.0} for n in range(5)
    )
    add_lines(tmp_path / "metrics.jsonl", *lines)
    table = MetricTable(tmp_path)
    assert ask_for(table, [])["times"][-1] == 86440
    assert table.skipped["clock_jumps"] == 0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False)))
def test_seven_digits_are_kept(values):
    for value, shown in zip(values, plain(np.array(values)), strict=True):
        assert (shown is None) if math.isnan(value) else shown == pytest.approx(value, rel=1e-6, abs=1e-300)
