"""`unirl runs`: which runs there are, what one did, how several differ, and a live one as it goes on.

Reads run directories alone, with no torch, no Ray and no network; nothing is ever written there.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from unirl.config import default_text
from unirl.dashboard.cost import spent_s
from unirl.dashboard.event_log import EventLog
from unirl.dashboard.metric_table import MetricTable
from unirl.data.atomic import DataError
from unirl.evaluation.comparison import ComparedMeasure, compare_evaluations
from unirl.evaluation.evaluate import Estimate, EvaluationResult
from unirl.evaluation.exam import ExamRow, exam_rows
from unirl.evaluation.run_reader import RunRecord, read_run
from unirl.jobs.run_dirs import RUNS, is_run
from unirl.monitoring.alerts import alert_line
from unirl.monitoring.conditions import Conditions
from unirl.monitoring.folder_lock import is_locked
from unirl.monitoring.metrics import reduce_values
from unirl.monitoring.run_facts import resume_command
from unirl.monitoring.run_state import state_now
from unirl.monitoring.terminal import format_duration, step_line
from unirl.run_files import Tail, find_runs, last_records, read_settings

WINDOW = 5
"""Steps over which first and last values are taken."""
LOOK_EVERY_S = 0.5
INTERRUPTED = 130
HEADLINES = {
    "reward/understanding": "r_und",
    "reward/generation": "r_gen",
    "sft/nats/text": "nats_txt",
    "sft/nats/image": "nats_img",
}
_SHOWN = (
    *(f"reward/{task}{part}" for task in ("understanding", "generation")
      for part in ("", "/aligned", "/retrieved", "/zero_variance_fraction", "/unjudged_fraction")),
    *HEADLINES, "sft/accuracy/text", "sft/accuracy/image", "policy/kl", "policy/clip_fraction", "policy/entropy/text",
    "policy/entropy/image", "policy/logprob_gap_max", "learner/grad_norm", "learner/grad_cosine", "learner/lr",
    "rollout/tokens_per_s", "time/step_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run's own files and lock say of it."""

    id: str
    folder: str
    status: str
    """As `state_now` says it, the same word as on the dashboard; or "unreadable"."""
    reason: str
    created: str
    step: int
    """Last recorded; 0 before the first."""
    num_steps: int | None
    """None where nobody knows yet."""
    duration_s: float
    """From the first start to the last sign of life; pauses before it was resumed do not count."""
    last: dict[str, float]
    """Headline metrics, means over the last five steps."""


def show_list(folder: Path | None, *, as_json: bool) -> int:
    """Print every run below a folder, newest last; returns the exit code.

    Raises:
        DataError: there is no such folder.
    """
    folder = folder or RUNS
    if not folder.is_dir():
        raise DataError(f"runs: expected a folder of runs; got {folder}, which is not there; name another")
    states = sorted((state_of(run) for run in find_runs(folder)), key=lambda state: (state.created, state.folder))
    if as_json:
        _print_json([asdict(state) for state in states])
        return 0
    if not states:
        sys.stderr.write(f"no run below {folder}\n")
        return 0
    rows = [("run", "started", "status", "step", "took", f"last {WINDOW} steps")]
    for state in states:
        values = " ".join(f"{HEADLINES[name]}={value:.3f}" for name, value in state.last.items())
        step = f"{state.step}/{state.num_steps or '?'}"
        rows.append((state.folder, state.created[:16], state.status, step, format_duration(state.duration_s), values))
    sys.stdout.write(_columns(rows))
    return 0


def show(name: Path, *, as_json: bool) -> int:
    """Print what one run was, did and scored; returns the exit code.

    Raises:
        DataError: no run, or a damaged one.
    """
    record = _read(name)
    state = state_of(record.folder)
    conditions = Conditions(record.events)
    values = {metric: [value for _, value in record.series(metric)] for metric in dict.fromkeys(_SHOWN)}
    means = {metric: _first_and_last(metric, found) for metric, found in values.items() if found}
    measures = compare_evaluations(_ends(record))
    if as_json:
        document = asdict(state) | {
            "run": record.run,
            "metrics": means,
            "evaluations": {step: _estimates(result) for step, result in record.evaluations.items()},
            "exam": [asdict(row) for row in _exam_of_run(record)],
            "alerts": [event for event in record.events if event.get("kind") == "alert"],
            "num_alerts": {"open": conditions.num_open, "all": conditions.num},
            "num_bad_lines": record.num_bad_lines,
        }
        _print_json(document)
        return 0
    run = record.run
    facts = {
        "run": f"{state.id} in {record.folder}",
        "status": state.status + (f": {state.reason}" if state.reason not in ("", state.status) else ""),
        "steps": f"{state.step} of {state.num_steps or '?'}, attempt {run.get('attempt', 0)}",
        "started": f"{state.created}, took {format_duration(state.duration_s)}",
        "where": f"{run.get('host')}, process {run.get('pid')}, commit {run.get('git_commit')}",
        "changed": " ".join(f"{k}={default_text(v[1])}" for k, v in (run.get("changed") or {}).items()) or "nothing",
    }
    if state.status == "killed":
        facts["go on"] = resume_command(record.folder, run)
    if record.num_bad_lines:
        facts["skipped"] = f"{record.num_bad_lines} lines that could not be read"
    sys.stdout.write("".join(f"{key:<8} {value}\n" for key, value in facts.items()))
    _print_table(
        ("metric", f"first {WINDOW}", f"last {WINDOW}"),
        [(metric, f"{first:.4g}", f"{last:.4g}") for metric, (first, last) in means.items()],
    )
    first_last = [str(step) for step in list(record.evaluations)[:1] + list(record.evaluations)[1:][-1:]]
    _print_evaluations([f"step {step}" for step in first_last], measures, "evaluation, 95 % intervals")
    _print_exam(["before", "after"], _exam_of_run(record))
    told = [(alert_line(c.alert) if c.is_open else f"over at step {c.over}: {alert_line(c.alert)}",)
            for c in conditions.all[:5]]  # fmt: skip
    _print_table((f"alerts: {conditions.num_open} open, {conditions.num} in all",), told)
    return 0


def compare(names: Sequence[Path], *, as_json: bool) -> int:
    """Print how runs differ: settings, last evaluation, and what further ones gain over the first; the exit code.

    Raises:
        DataError: no run, or a damaged one.
    """
    records = [_read(name) for name in names]
    settings = {key: values for key, values in _settings_side_by_side(records).items() if len(set(values)) > 1}
    measures = compare_evaluations([_ends(record)[-1] for record in records])
    exams = {number: _exam_between(records[0], other) for number, other in enumerate(records[1:], 1)}
    labels = _labels(records)
    steps = [max(record.evaluations, default=None) for record in records]
    if as_json:
        document = {
            "runs": [str(record.folder) for record in records],
            "settings": settings,
            "evaluated_at": dict(zip(labels, steps, strict=True)),
            "evaluation": [asdict(measure) for measure in measures],
            "exam": {labels[number]: [asdict(row) for row in rows] for number, rows in exams.items() if rows},
        }
        _print_json(document)
        return 0
    _print_table(("setting", *labels), [(key, *values) for key, values in settings.items()])
    _print_evaluations(labels, measures, "last evaluation, 95 % intervals", steps)
    if measures:
        _print_what_has_no_difference(labels, measures, steps)
    for number, rows in exams.items():
        _print_exam([labels[0], labels[number]], rows)
    if not settings and not measures:
        sys.stdout.write("the same settings; neither was evaluated\n")
    return 0


def tail(name: Path, *, num_lines: int, wait_s: float, as_json: bool) -> int:
    """Print a line a step until the run ends; returns 0, 1 when it failed or was killed, or 130 after Ctrl-C.

    Args:
        name: the run; it may be about to start.
        num_lines: of the steps that are there already.
        wait_s: patience for a run directory that is not there yet.
        as_json: print the lines of metrics.jsonl.

    Raises:
        DataError: there is no run.
    """
    try:
        folder = _await_run(name, wait_s)
        _follow(folder, num_lines, as_json=as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    state = state_of(folder)
    sys.stderr.write(f"{folder}: {state.status}{f', {state.reason}' if state.reason else ''}\n")
    return int(state.status not in ("finished", "interrupted"))


def _follow(folder: Path, num_lines: int, *, as_json: bool) -> None:
    metrics = Tail(folder.resolve(), "metrics.jsonl")
    seconds: deque[float] = deque(maxlen=20)
    skipped = None
    while True:
        # Asked first: what the run wrote before it let go is read before its end is believed.
        live = is_locked(folder)
        lines = [line for line in metrics.news() if isinstance(line.get("step"), int)]
        seconds.extend(value for line in lines if (value := _number(line, "time/step_s")) is not None)
        if skipped is None:
            skipped = max(0, len(lines) - num_lines)
            lines = lines[skipped:]
            if live and not lines:
                sys.stderr.write(f"{folder}: waiting for the next step\n")
        num_steps = state_of(folder).num_steps if lines else None
        for line in lines:
            _print_step(line, num_steps, seconds, as_json=as_json)
        sys.stdout.flush()
        if not live:
            return
        time.sleep(LOOK_EVERY_S)


def state_of(folder: Path) -> RunState:
    """What is known of a run without reading all of it."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        created = str(run["created"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return RunState(
            id=folder.name, folder=str(folder), status="unreadable", reason=f"run.json: {error!r}", created="", step=0,
            num_steps=None, duration_s=0.0, last={},
        )  # fmt: skip
    settings = read_settings(folder)
    # Of the last 64 kB of them.
    lines = [line for line in last_records(folder, "metrics.jsonl", 1 << 16) if isinstance(line.get("step"), int)][::-1]
    seconds = [value for line in lines[-20:] if (value := _number(line, "time/step_s")) is not None]
    ends = [_unix(created), _unix(run.get("updated", "")), *(_number(line, "time") or 0.0 for line in lines[-1:])]
    recent = list({line["step"]: line for line in lines}.values())[-WINDOW:]
    values = {name: [v for line in recent if (v := _number(line, name)) is not None] for name in HEADLINES}
    return RunState(
        id=str(run.get("id", folder.name)),
        folder=str(folder),
        status=state_now(folder, run, settings, median(seconds) if seconds else None),
        reason=str(run.get("reason", "")),
        created=created,
        step=lines[-1]["step"] if lines else 0,
        num_steps=run.get("num_steps") or settings.get("train.num_steps"),
        duration_s=_resumed_s(folder) if run.get("attempt") else max(ends) - ends[0] if ends[0] else 0.0,
        last={name: reduce_values(name, found) for name, found in values.items() if found},
    )


def _resumed_s(folder: Path) -> float:
    """Seconds that all starts of a run took."""
    events, metrics = EventLog(folder), MetricTable(folder)
    events.refresh()
    metrics.refresh()
    return spent_s(events.attempts, metrics.attempts)


def find_run(name: Path) -> Path:
    """The run directory that is meant: a folder, or the name of one in runs/.

    Raises:
        DataError: there is none.
    """
    for folder in (name, RUNS / name):
        if is_run(folder):
            return folder
    raise DataError(
        f"runs: expected a run directory with a run.json; got {name}; `unirl runs list` shows what is there"
    )


def _read(name: Path) -> RunRecord:
    try:
        return read_run(find_run(name))
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def _await_run(name: Path, wait_s: float) -> Path:
    start = time.monotonic()
    told = False
    while True:
        try:
            return find_run(name)
        except DataError:
            if time.monotonic() - start >= wait_s:
                raise
        if not told:
            sys.stderr.write(f"no run at {name} yet; waiting up to {wait_s:g} s (--wait) for one that starts\n")
            told = True
        time.sleep(LOOK_EVERY_S)


def _print_step(line: Mapping[str, Any], num_steps: int | None, seconds: Iterable[float], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(line) + "\n")
        return
    values = {name: value for name, value in line.items() if "/" in name and isinstance(value, int | float)}
    times = list(seconds)
    eta = median(times) * (num_steps - line["step"]) if num_steps and times else None
    sys.stdout.write(step_line(line["step"], num_steps or line["step"], values, eta) + "\n")


def _settings_side_by_side(records: Sequence[RunRecord]) -> dict[str, tuple[str, ...]]:
    """Every setting as text, one value a run; what a run lacks is "-"."""
    sides = [read_settings(record.folder) for record in records]
    keys = sorted({key for side in sides for key in side})
    return {key: tuple(default_text(side[key]) if key in side else "-" for side in sides) for key in keys}


def _ends(record: RunRecord) -> list[EvaluationResult | None]:
    """The first and the last evaluation; one of them where there is only one, [None] without any."""
    results = list(record.evaluations.values())
    return [results[0], results[-1]] if len(results) > 1 else [*results] or [None]


def _exams(record: RunRecord) -> list[dict[str, Any]]:
    try:
        return [json.loads(path.read_text()) for path in sorted(record.folder.glob("evaluations/exam_*.json"))]
    except ValueError as error:
        raise DataError(f"{record.folder}: expected exams in JSON; got {error}; restore them from a copy") from error


def _exam_of_run(record: RunRecord) -> list[ExamRow]:
    exams = _exams(record)
    return exam_rows(exams[0], exams[-1]) if exams else []


def _exam_between(one: RunRecord, other: RunRecord) -> list[ExamRow]:
    left, right = _exams(one), _exams(other)
    return exam_rows(left[-1], right[-1]) if left and right else []


def _estimates(result: EvaluationResult) -> dict[str, dict[str, Any]]:
    return {name: asdict(estimate) for name, estimate in result.estimates.items()}


def _first_and_last(metric: str, values: list[float]) -> tuple[float, float]:
    return reduce_values(metric, values[:WINDOW]), reduce_values(metric, values[-WINDOW:])


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Short names, or whole paths where those repeat."""
    names = [record.folder.resolve().name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _print_what_has_no_difference(
    labels: Sequence[str], measures: Sequence[ComparedMeasure], steps: Sequence[int | None]
) -> None:
    missing = [label for label, step in zip(labels, steps, strict=True) if step is None]
    if missing:
        sys.stdout.write("".join(f"{label} has no evaluation\n" for label in missing))
    for number, label in enumerate(labels[1:]):
        if {labels[0], label}.isdisjoint(missing) and not any(measure.differences[number] for measure in measures):
            sys.stdout.write(
                f"{label} and {labels[0]} were evaluated on different held-out items: their difference has no paired "
                "interval\n"
            )


def _print_evaluations(
    labels: Sequence[str], measures: Sequence[ComparedMeasure], title: str, steps: Sequence[int | None] = ()
) -> None:
    at = ["" if step is None else f", step {step}" for step in steps] or [""] * len(labels)
    sides = [label + step for label, step in zip(labels, at, strict=True)]
    head = (title, *sides, *(f"{label} - {labels[0]}" for label in labels[1:]))
    rows = [
        (measure.name, *(_interval(e) for e in measure.estimates), *(_interval(d, "+") for d in measure.differences))
        for measure in measures
    ]
    _print_table(head, rows)


def _print_exam(labels: Sequence[str], rows: Sequence[ExamRow]) -> None:
    shown = [
        (row.metric, *("{:.3f} [{:.3f}, {:.3f}]".format(*side) for side in (row.before, row.after)),
         "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row.gain), str(row.num))
        for row in rows
    ]  # fmt: skip
    _print_table(("exam, 95 % intervals", *labels, "difference", "items"), shown)


def _interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return "-"
    form = f"{sign}.3f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{form}} (n {estimate.num})"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}] (n {estimate.num})"


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        sys.stdout.write("\n" + _columns([head, *rows]))


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def _print_json(document: object) -> None:
    sys.stdout.write(json.dumps(_finite(document), indent=1, default=str) + "\n")


def _finite(value: Any) -> Any:
    """The value with null for what JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(line: Mapping[str, Any], name: str) -> float | None:
    value = line.get(name)
    return value if isinstance(value, int | float) else None


def _unix(stamp: str) -> float:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (TypeError, ValueError):
        return 0.0
