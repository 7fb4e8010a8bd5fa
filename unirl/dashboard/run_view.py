"""One run as the page shows it. Reads its directory and nothing else, and only what changed since it was last read."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from yaml import YAMLError

from unirl.config import MonitoringConfig
from unirl.dashboard import cost
from unirl.dashboard.evaluations import Evaluations
from unirl.dashboard.event_log import EventLog
from unirl.dashboard.fleet import Fleet
from unirl.dashboard.metric_table import MetricTable, as_number, plain
from unirl.dashboard.shown_pairs import PairFilter, ShownPairs, as_list, cut_texts
from unirl.dashboard.used_pairs import UsedPairs
from unirl.monitoring.metrics import lookup
from unirl.monitoring.run_facts import resume_command
from unirl.monitoring.run_state import GONE, WRITTEN, modified, state_now
from unirl.run_files import (
    MAX_SETTINGS_BYTES,
    Record,
    held_versions,
    last_beats,
    last_record,
    list_inside,
    parse_settings,
    read_inside,
    silent_after_s,
)
from unirl.types import TASKS

QUICK_BYTES = 4 << 20
WARM_AFTER_S = 1.5
WARM_BYTES = 1 << 20
RECENT_STEPS = 20


class RunView:
    """One run directory. May be asked by several threads: they take turns."""

    def __init__(self, folder: Path) -> None:
        """Remember the directory; nothing is read yet.

        Args:
            folder: the run directory, without links in its path.
        """
        self.folder = folder
        self._turn = threading.RLock()
        self._facts: dict[str, tuple[tuple[int, int], Any]] = {}
        self._events = EventLog(folder)
        self.forget()

    def forget(self) -> None:
        """Give back the memory of what was read; it is read again when asked for."""
        with self._turn:
            self._metrics = MetricTable(self.folder)
            self._shown = ShownPairs(self.folder)
            self._used = UsedPairs(self.folder)
            self._evaluations = Evaluations(self.folder)
            self._fleet = Fleet(self.folder)
            self._is_warm = False

    @property
    def is_there(self) -> bool:
        """Whether the run directory was not removed since it was found."""
        return (self.folder / "run.json").exists()

    # What stands in the list of runs.

    def brief(self) -> dict[str, Any]:
        """Status, progress and alerts, without reading the whole of any file but the events."""
        with self._turn:
            self._events.refresh()
            last = last_record(self.folder, "metrics.jsonl")
            status = self._status(as_number(last.get("time/step_s")))
            return {
                "status": status,
                "stalled": status in GONE,
                "step": last["step"] if type(last.get("step")) is int else 0,
                "num_steps": self._num_steps(),
                "updated": self._written() or None,
                "num_alerts": self._events.num_alerts,
            }

    def overview(self) -> dict[str, Any]:
        """All but the curves, pairs and workers."""
        with self._turn:
            strip = self.strip()
            return {
                "run": cut_texts(self._run()),
                "config": cut_texts(self._config()),
                "strip": strip,
                "metrics": [_describe(name) for name in self._metrics.names],
                "evaluations": self._evaluations.all(),
                "skipped": strip["skipped"],
            }

    def strip(self, known_alerts: int | None = None) -> dict[str, Any]:
        """The status strip; its "overview" is another one as soon as anything else in the overview is.

        Args:
            known_alerts: `num_alerts.changes` of before; when nothing changed since, alerts are left out.
        """
        with self._turn:
            self._metrics.refresh()
            self._evaluations.refresh()
            self._events.refresh()
            for part in (self._shown, self._used):
                if part.tail.unread() < QUICK_BYTES:  # else they are read in a while, see `warm_later`
                    part.refresh()
            beats = last_beats(self.folder)
            up = {beat["actor"]: time.time() - beat["time"] <= self._silent_after() for beat in beats}
            held = held_versions(self.folder)
            samplers = {beat["actor"] for beat in beats if up[beat["actor"]] and beat["role"].startswith("rollout")}
            lags = {actor: lag for actor, lag in _lags(held).items() if actor in samplers}
            written, step, num_steps = self._written(), self._metrics.step, self._num_steps()
            usual = self._usual_step_s()
            status = self._status(usual)
            left = num_steps - step if status == "running" and num_steps is not None else None
            return {
                "overview": self._overview_mark(),
                "status": status,
                "resume": resume_command(self.folder, self._run()) if status == "killed" else None,
                "step": step,
                "num_steps": num_steps,
                "eta_s": None if left is None or usual is None else round(max(0, left) * usual, 1),
                "age_s": round(max(0.0, time.time() - written), 1) if written else None,
                "stalled": status in GONE,
                "workers": self._workers([(beat["role"], up[beat["actor"]]) for beat in beats]),
                "version": max((version for _, _, version in held), default=self._version(None)),
                "lag": {"max": max(lags.values(), default=None), "by_actor": lags},
                "num_alerts": self._events.num_alerts,
                "alerts": None if known_alerts == self._events.num_alerts["changes"] else self._events.alerts,
                "cost": self._cost(running=status == "running"),
                "skipped": self._skipped(),
            }

    # What the curves, the pair view and the fleet ask for.

    def metrics(
        self, names: list[str], since: str | None, window: tuple[int | None, int | None], points: int
    ) -> dict[str, Any]:
        """Columns of metrics; see `MetricTable.query`."""
        with self._turn:
            self._metrics.refresh()
            found = self._metrics.query(names, since=since, window=window, points=points)
            per_step = self._samples_per_step()
        steps = found["steps"].tolist()
        return found | {
            "steps": steps,
            "times": np.round(found["times"], 2).tolist(),
            "starts": sorted(round(attempt.shown, 2) for attempt in self._metrics.attempts.values()),
            "samples": [None if per_step is None else step * per_step for step in steps],
            "values": {name: plain(values) for name, values in found["values"].items()},
        }

    def events(self, since: str | None) -> dict[str, Any]:
        """Events after a cursor; see `EventLog.since`."""
        with self._turn:
            self._events.refresh()
            return self._events.since(since)

    def fleet(self, since: float | None) -> dict[str, Any]:
        """Every worker, with what it did after `since` by its own clock."""
        with self._turn:
            self._events.refresh()
            actors = self._fleet.describe(since, self._silent_after())
            for actor in actors:
                actor["restarts"] = max(actor["restarts"], self._events.restarts.get(actor["actor"], 0))
            return {"now": round(time.time(), 2), "actors": actors}

    def pairs(self, asked: PairFilter, *, offset: int, limit: int) -> dict[str, Any]:
        """Shown pairs that fit; see `ShownPairs.find`."""
        with self._turn:
            self._shown.refresh()
            return self._shown.find(asked, offset=offset, limit=limit)

    def pair(self, step: int, pair_id: str) -> Record | None:
        """One shown pair with all that is known of it; None when it was not shown."""
        with self._turn:
            self._shown.refresh()
            self._metrics.refresh()
            line = self._shown.line(step, pair_id)
            if line is None:
                return None
            samples = [s for t in TASKS for s in _samples(line, t)]
            versions = [s["policy_version"] for s in samples if type(s.get("policy_version")) is int]
            line["policy_version"] = min(versions, default=self._version(step))
            return line

    def pair_history(self, pair_id: str) -> list[dict[str, Any]]:
        """Every use of a pair, and whether it can be looked at."""
        with self._turn:
            self._shown.refresh()
            return [use | {"shown": self._shown.is_shown(use["step"], pair_id)} for use in self._used.history(pair_id)]

    def similarities(self, step: int | None, window: int) -> dict[str, Any]:
        """Histogram by kind; see `UsedPairs.similarities`."""
        with self._turn:
            return self._used.similarities(step, window)

    def summary(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings, and the last evaluation: step and means; {} where there is none."""
        with self._turn:
            self._evaluations.refresh()
            evaluations = self._evaluations.all()
            return cut_texts(self._config()), evaluations[-1] if evaluations else {}

    def warm_later(self) -> None:
        """Read what will be asked for soon, once the page had time to draw what it asked for first."""
        with self._turn:
            if not self._is_warm:
                self._is_warm = True
                timer = threading.Timer(WARM_AFTER_S, self._warm)
                timer.daemon = True
                timer.start()

    def _warm(self) -> None:
        for part in (self._shown, self._used):
            before = -1
            while part.tail.position > before and part.tail.unread():
                before = part.tail.position
                with self._turn:
                    part.refresh(WARM_BYTES)
                time.sleep(0.01)  # whoever waits for its turn gets it

    # Facts.

    def _overview_mark(self) -> str:
        """Short, and another one when metrics, evaluations, facts or settings of the overview are."""
        run = {name: fact for name, fact in self._run().items() if name != "updated"}
        facts = [cut_texts(run), cut_texts(self._config()), self._evaluations.all(), self._metrics.names]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _fact(self, name: str, read: Callable[[str], Any]) -> Any:
        """A small file as `read` makes it, read again only when it changed; {} when it cannot be read."""
        try:
            facts = (self.folder / name).stat()
        except OSError:
            return {}
        state = (facts.st_mtime_ns, facts.st_size)
        if self._facts.get(name, (None,))[0] != state:
            try:
                self._facts[name] = (state, read(read_inside(self.folder, name, MAX_SETTINGS_BYTES).decode()))
            except (OSError, ValueError, RecursionError, YAMLError):
                self._facts[name] = (state, {})
        return self._facts[name][1]

    def _run(self) -> Record:
        run = self._fact("run.json", json.loads)
        return run if isinstance(run, dict) else {}

    def _config(self) -> Record:
        return self._fact("config.yaml", parse_settings)

    def _setting(self, key: str, default: float) -> float:
        value = as_number(self._config().get(key))
        return default if value is None else value

    def _silent_after(self) -> float:
        return silent_after_s(self._setting("monitoring.heartbeat_s", MonitoringConfig().heartbeat_s))

    def _status(self, usual_step_s: float | None) -> str:
        return state_now(self.folder, self._run(), self._config(), usual_step_s)

    def _num_steps(self) -> int | None:
        told = as_number(self._run().get("num_steps"))  # what the run counted itself
        found = (told, *(as_number(self._config().get(key)) for key in ("train.num_steps", "train.max_steps")))
        return next((int(value) for value in found if value is not None), None)

    def _samples_per_step(self) -> int | None:
        """Completions of a step, or conversations of a fine-tuning step; None when the settings do not say."""
        own = as_number(self._config().get("train.samples_per_step"))
        names = ("pairs_per_step", "num_understanding", "num_generation")
        pairs, answers, drawings = (as_number(self._config().get(f"rollout.{name}")) for name in names)
        if own is None and pairs is not None and answers is not None and drawings is not None:
            own = pairs * (answers + drawings)
        return None if own is None else int(own)

    def _written(self) -> float:
        """Unix time of the newest write; 0 without any."""
        names = (*WRITTEN, *(f"actors/{name}" for name in list_inside(self.folder, "actors")))
        return max(modified(self.folder / name) for name in names)

    def _usual_step_s(self) -> float | None:
        seconds = self._metrics.recent("time/step_s", RECENT_STEPS)
        return median(seconds) if seconds else None

    def _version(self, step: int | None) -> int | None:
        version = self._metrics.last_value("rollout/policy_version", step)
        return None if version is None else int(version)

    def _workers(self, beats: list[tuple[str, bool]]) -> dict[str, list[int]]:
        """Workers that are up, and those that there should be, by role."""
        up: dict[str, int] = {}
        for role, is_up in beats:
            up[role] = up.get(role, 0) + is_up
        # A run in one process has the driver alone.
        planned = cost.planned_workers(self._config()) | self._events.scaled if up.keys() - {"driver"} else {}
        totals = {role: max(planned.get(role, 1), up.get(role, 0)) for role in (*up, *planned)}
        return {role: [up.get(role, 0), total] for role, total in totals.items() if total}

    def _cost(self, *, running: bool) -> dict[str, float]:
        """CPU- and GPU-hours of what the run says it holds, or what its settings ask for."""
        cpus, gpus = cost.resources(self._config())
        held = self._run().get("resources")
        if isinstance(held, dict):
            cpus, gpus = (as_number(held.get(name)) or 0.0 for name in ("CPU", "GPU"))
        since = time.time() - self._written() if running else 0.0
        hours = cost.spent_s(self._events.attempts, self._metrics.attempts, max(0.0, since)) / 3600
        return {"cpu_hours": round(hours * cpus, 4), "gpu_hours": round(hours * gpus, 4)}

    def _skipped(self) -> dict[str, int]:
        tails = [part.tail for part in (self._metrics, self._shown, self._used, self._events)]
        return {
            "bad_lines": sum(tail.bad_lines for tail in tails) + self._fleet.bad_lines,
            "bad_files": self._evaluations.bad_files,
            "refused_files": sum(tail.refused for tail in tails),
            "missing_images": self._shown.missing_images,
            "refused_images": self._shown.refused_images,
            **self._metrics.skipped,
        }


def _lags(held: list[tuple[float, str, int]]) -> dict[str, int]:
    """By how many updates each actor was behind when it last spoke; what others said later counts for nothing.

    Args:
        held: time, actor and version of heartbeats, in order.
    """
    newest, lags = 0, {}
    for _, actor, version in held:
        newest = max(newest, version)
        lags[actor] = newest - version
    return lags


def _describe(name: str) -> dict[str, str]:
    try:
        metric = lookup(name)
    except ValueError:
        return {"name": name, "unit": "", "meaning": ""}
    return {"name": name, "unit": metric.unit, "meaning": metric.meaning}


def _samples(line: Record, task: str) -> list[Record]:
    side = line.get(task)
    return [s for s in as_list(side.get("samples")) if isinstance(s, dict)] if isinstance(side, dict) else []
