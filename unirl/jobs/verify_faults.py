"""Does monitoring see what goes wrong? Plants every fault of the bank in a run of the lab, beside clean runs."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from unirl.config import DataConfig
from unirl.config_rules import ConfigError, Problem
from unirl.jobs.faults.bank import CLEAN, FAULTS
from unirl.jobs.faults.lab_run import MOST_STEPS, Outcome, run_clean, run_fault

log = logging.getLogger(__name__)

LOG_WIDTH = 118


def main(*, only: Sequence[str] = (), as_json: bool = False) -> int:
    """Run the bank and print the table.

    Args:
        only: names of faults; none runs all of them and the clean runs.
        as_json: print one JSON object.

    Returns:
        0, or 1 when a fault was not caught in time, or a sentinel spoke where nothing was wrong.

    Raises:
        ConfigError: no fault of this name.
    """
    started = time.perf_counter()
    found: list[Outcome] = []
    for outcome in outcomes(only):
        found.append(outcome)
        log.info("%s: %s (%.1f s)", outcome.name, verdict(outcome), outcome.seconds)
    passed = all(outcome.passed for outcome in found)
    if as_json:
        runs = [asdict(outcome) | {"passed": outcome.passed} for outcome in found]
        sys.stdout.write(json.dumps({"passed": passed, "runs": runs}, indent=2) + "\n")
    else:
        show(found, time.perf_counter() - started)
    return 0 if passed else 1


def outcomes(only: Sequence[str]) -> Iterator[Outcome]:
    """Each run's, in turn."""
    known = [fault.name for fault in FAULTS]
    if wrong := sorted(set(only) - set(known)):
        problem = Problem("--only", wrong[0], "is not a fault of the bank", f"there are {', '.join(known)}")
        raise ConfigError([problem])
    runs: list[Callable[[], Outcome]] = []
    cache = DataConfig().cache_dir
    runs += [lambda fault=fault: run_fault(fault, cache) for fault in FAULTS if not only or fault.name in only]
    runs += [lambda clean=clean: run_clean(clean, cache) for clean in CLEAN if not only]
    for run in runs:
        yield run()


def verdict(outcome: Outcome) -> str:
    """In a few words."""
    if outcome.early:
        return f"FALSE ALARM of {', '.join(outcome.early)}"
    if outcome.planted is None:
        return "no alarm" if outcome.passed else f"FALSE ALARM of {', '.join(outcome.also) or outcome.error}"
    if outcome.caught is None:
        return "NOT CAUGHT"
    return outcome.by if outcome.passed else f"{outcome.by}, TOO LATE"


def rows(found: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """Cells of each run: what, step planted, step caught, by which sentinel, which others spoke."""
    for outcome in found:
        planted, caught = (str(step or "") for step in (outcome.planted, outcome.caught))
        others = ", ".join(outcome.also) if outcome.planted else ""
        yield outcome.name, planted, caught, verdict(outcome), others


COLUMNS = ("fault, or clean run", "planted", "caught", "by", "also heard")


def show(found: Sequence[Outcome], seconds: float) -> None:
    """The table on stdout, then one line that says it all."""
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("planted", "caught") else "left")
    for row in rows(found):
        table.add_row(*row)
    console.print(table, markup=False)
    console.print(f"{summary(found)} ({seconds:.0f} s)", markup=False)


def summary(found: Sequence[Outcome]) -> str:
    """How many were caught, and how many clean runs were left alone."""
    faults = [outcome for outcome in found if outcome.planted]
    clean = [outcome for outcome in found if not outcome.planted]
    parts = [f"{sum(o.passed for o in faults)} of {len(faults)} faults caught within {MOST_STEPS} steps"]
    if clean:
        steps = sum(outcome.steps for outcome in clean)
        parts.append(f"{sum(o.passed for o in clean)} of {len(clean)} clean runs ({steps} steps) without an alarm")
    return "; ".join(parts)


def page(found: Sequence[Outcome]) -> Iterator[str]:
    """docs/faults.md: the table, and what each fault is."""
    yield PREFACE
    yield f"**{summary(found)}.**"
    yield ""
    yield "| fault | what is wrong | planted | caught | by | also heard |"
    yield "|---|---|---|---|---|---|"
    for outcome, row in zip(found, rows(found), strict=True):
        if outcome.planted:
            name, planted, caught, by, others = row
            yield f"| `{name}` | {outcome.what} | {planted} | {caught} | {by} | {others} |"
    yield ""
    yield "| clean run | steps | verdict |"
    yield "|---|---|---|"
    for outcome in found:
        if not outcome.planted:
            yield f"| {outcome.name} | {outcome.steps} | {verdict(outcome)} |"


PREFACE = f"""\
# Faults that sentinels must catch

Printed by `python -m unirl.jobs.verify_faults > docs/faults.md`, which runs the bank, as does `unirl verify --faults`.

Each fault is planted in a real run of the [lab](lab.md) at step 3, by putting other code in the place of the real one.
A [sentinel](sentinels.md) must catch it, as an alert or as a refusal that ends the run, in that step or one of the
{MOST_STEPS - 1} after it. In clean runs no sentinel may speak.
"""


if __name__ == "__main__":
    sys.stdout.write("\n".join(page(list(outcomes(())))) + "\n")
