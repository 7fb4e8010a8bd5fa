"""`unirl bench dashboard`: the dashboard before a long run."""

import sys

from unirl.benchmarks.dashboard import DashboardBench, measure_dashboard
from unirl.benchmarks.dashboard_browser import find_chromium, measure_page
from unirl.benchmarks.dashboard_run import LongRun


def main(*, steps: int, pairs: int, as_json: bool, save: bool) -> int:
    """Measure, print, and keep the result for the docs if asked.

    Args:
        steps: of the made run.
        pairs: shown ones.
        as_json: print JSON instead of tables.
        save: keep it.
    """
    browser = measure_page if find_chromium() else None
    report = measure_dashboard(DashboardBench(run=LongRun(num_steps=steps, num_pairs=pairs), browser=browser))
    if save:
        report.save()
    sys.stdout.write(report.as_json() if as_json else report.as_text())
    return 0
