"""What `unirl bench dashboard` measures in a browser, at a small size."""

import pytest

from tests.browser.watching import require_browser, serving
from tests.monitoring.made_run import make_run
from unirl.benchmarks import dashboard_browser


@pytest.mark.slow
def test_the_page_is_measured(tmp_path, monkeypatch):
    require_browser()
    for name, small in {"NUM_VISITS": 1, "NUM_SWITCHES": 3, "NUM_STEPS": 2, "IDLE_S": 3.0}.items():
        monkeypatch.setattr(dashboard_browser, name, small)
    run = make_run(tmp_path / "runs" / "one", num_steps=3, num=5, pairs_every=1)
    with serving(tmp_path / "runs") as url:
        rows, goals = dashboard_browser.measure_page(url, run)
    assert all(row["value"] > 0 for row in rows)
    assert [goal.wanted for goal in goals] == [3.0, 0.3, 5000.0, 5000.0]
    assert goals[-1].met, "a step brings no whole overview"
