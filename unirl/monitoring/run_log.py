"""The run directory: what one run leaves on disk, and its one writer. docs/run_directory.md describes the files."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from unirl.config import MonitoringConfig, RlConfig, SftConfig, default_text
from unirl.config_loading import to_yaml
from unirl.monitoring import journal, pair_view
from unirl.monitoring.alerts import alert_line, warn_of_alerts
from unirl.monitoring.control import forget_orders
from unirl.monitoring.durable_files import JsonLines, encode_line, read_lines, write_atomic
from unirl.monitoring.folder_lock import FolderLock, RunDirError
from unirl.monitoring.images import encode_webp, thin_images
from unirl.monitoring.metrics import lookup, step_metrics
from unirl.monitoring.mirrors import Mirror, MirroredRun, Mirrors
from unirl.monitoring.run_facts import describe_run, resume_command, without_secrets
from unirl.monitoring.sentinel_table import alert_fields, refusing_sentinel, sentinel_of
from unirl.monitoring.sentinels import StoppedByAlertError, watch
from unirl.monitoring.step_data import StepData
from unirl.types import QuarantinedRequest

log = logging.getLogger(__name__)

_FILES = ("metrics", "pairs", "used_pairs", "events")

Status = Literal["running", "finished", "interrupted", "failed"]
Report = Callable[[str, str, Mapping[str, object]], None]
"""Takes kind, message and fields of an event, as `RunLog.event` does."""


class RunLog:
    """Writes one run directory. A context manager: leaving it records how the run ended."""

    def __init__(
        self,
        run_dir: Path,
        config: Any,
        monitoring: MonitoringConfig,
        *,
        overrides: Sequence[str] = (),
        facts: Mapping[str, object] | None = None,
        resume: bool = False,
        mirrors: Sequence[Mirror] = (),
    ) -> None:
        """Create the directory, or open it again with `resume`.

        Args:
            run_dir: the run directory.
            config: the job's whole config, for config.yaml. Values of keys such as `api_key` are left out.
            monitoring: what to record.
            overrides: the command's arguments as typed.
            facts: more for run.json, such as the Ray job id. The environment is never recorded.
            resume: go on with a run that is already there.
            mirrors: where else the metrics go; opened here once the directory is this run's own.

        Raises:
            RunDirError: the directory holds a run and `resume` is False, holds something else, or is being written.
            OSError: the disk is full or refuses.
        """
        self.run_dir = run_dir
        self._monitoring = monitoring
        _refuse_strangers(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(run_dir)
        self._ended = False
        steps = [line["step"] for line in read_lines(run_dir / "metrics.jsonl")] if resume else []
        self._step: int = max(steps, default=0)
        self.stopping = ""
        """The alert that is to end the run; empty while there is none."""
        self.gone: set[str] = set()
        """Actors that are gone for good, by the names of their heartbeats."""
        try:
            forget_orders(run_dir)
            before = _read_run(run_dir, resume)
            watched = isinstance(config, RlConfig | SftConfig)
            self.sentinels = watch(config, run_dir) if watched else None
            """None where none watch."""
            self.attempt: int = before.get("attempt", -1) + 1
            """Starts of this run before the present one."""
            opening = {"v": 1, "id": run_dir.resolve().name, "created": _now()} | before | {"attempt": self.attempt}
            self._run = opening | describe_run(config) | dict(facts or {})
            self._settings = {
                "config.yaml": without_secrets(to_yaml(config)),
                "overrides.txt": without_secrets("".join(f"{override}\n" for override in overrides)),
            }
            self._accepted = False
            if not before:
                self.accept()
            for name in ("images", "evaluations/images"):
                (run_dir / name).mkdir(parents=True, exist_ok=True)
            self._files = {name: JsonLines(run_dir / f"{name}.jsonl") for name in _FILES}
            self._mirrors = Mirrors(mirrors, lambda problem: self.event("mirror", problem))
            self._mirrors.open(
                MirroredRun(
                    run_dir=run_dir,
                    id=str(self._run["id"]),
                    created=str(self._run["created"]),
                    settings=self._settings["config.yaml"],
                )
            )
            self.event("resume" if before else "start", "the run goes on" if before else "the run starts")
        except BaseException:
            self._lock.release()
            raise

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return resume_command(self.run_dir, self._run)

    def accept(self) -> None:
        """Take the settings over as those of the run, which now is under way.

        A new run's are taken over at once. A resumed one keeps its old settings and status until this is called, so
        that settings it cannot go on with are refused without a trace.

        Raises:
            OSError: the disk is full or refuses.
        """
        self._accepted = True
        self._set_status("running")
        for name, text in self._settings.items():
            write_atomic(self.run_dir / name, text.encode())

    def note_changes(self, changed: Mapping[str, Sequence[object]]) -> None:
        """Say with which other settings a run goes on, if any: value before and now, by key."""
        if changed:
            shown = ", ".join(f"{key}: {' -> '.join(map(default_text, values))}" for key, values in changed.items())
            log.warning("resumed with other settings: %s", shown)
            self.event("settings", "resumed with other settings", {"changed": dict(changed)})

    def record_step(self, data: StepData) -> dict[str, float]:
        """Write the step's images, pairs, metrics and trajectories, in this order; return the metrics.

        The journal comes last: a step that has one was recorded whole, and is not sampled again after a crash.

        Raises:
            ValueError: a metric that the table lacks.
            OSError: the disk is full or refuses.
        """
        shown = self._monitoring
        images: pair_view.ImageNames = {}
        if data.step == 1 or (shown.pairs_every and data.step % shown.pairs_every == 0):
            lines, images = pair_view.write_pairs(self.run_dir / "images", data, shown.pairs_per_step)
            for line in lines:
                self._files["pairs"].append(line)
            thin_images(self.run_dir / "images", shown.images_max_mb * 2**20)
        self._files["used_pairs"].append(pair_view.used_pairs(data))
        values = step_metrics(data)
        self.write_metrics(data.step, values)
        self.write_quarantined(data.step, data.quarantined)
        self._ask_sentinels(data, values)
        if shown.journal:
            journal.write_step(self.run_dir, data, images)
        return values

    def record_sft_step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step of fine-tuning, and ask the sentinels about it.

        Raises:
            ValueError: a metric that the table lacks.
            OSError: the disk is full or refuses.
        """
        self.write_metrics(step, values)
        self._ask_sentinels(StepData(step=step, groups=(), learner=values), values)

    def _ask_sentinels(self, data: StepData, values: Mapping[str, float]) -> None:
        if self.sentinels is None:
            return
        begun, over = self.sentinels.look(data, values)
        for alert in begun:
            self.alert(alert.sentinel.name, alert.message, data.step, since=alert.since, stops=not alert.failed)
        for alert in over:
            self.event("alert over", alert.message, {"step": alert.step, "sentinel": alert.sentinel.name})

    def alert(
        self, sentinel: str, message: str, step: int | None = None, *, since: int | None = None, stops: bool = True
    ) -> None:
        """Note what a sentinel says; with `monitoring.on_alert=stop` most end the run after the step.

        Args:
            sentinel: its name.
            message: what is wrong.
            step: where; None takes the one under way.
            since: first step of a condition that lasts.
            stops: False where it is no verdict on the run, which then goes on.
        """
        step = self._step + 1 if step is None else step
        on_alert = self._monitoring.on_alert if stops else "warn"
        fields = alert_fields(sentinel_of(sentinel), step, on_alert) | {"since": since or step}
        self.event("alert", message, fields)
        if fields["severity"] == "stop":
            self.stopping = self.stopping or f"{sentinel}: {message}; {fields['remedy']}"

    def check_alerts(self) -> None:
        """End the run if an alert is to; call it when the step is saved.

        Raises:
            StoppedByAlertError: says which, and how to go on.
        """
        if self.stopping:
            raise StoppedByAlertError(
                f"monitoring.on_alert=stop: {self.stopping} Saved and ended. Mend what that names and go on with "
                f"`{self.resume_command} key=value`; as it is, it would end again. With monitoring.on_alert=warn it "
                "goes on whatever is found"
            )

    def write_quarantined(self, step: int, quarantined: Sequence[QuarantinedRequest]) -> None:
        """Name requests that could not be sampled, in quarantine.jsonl and in the events.

        Args:
            step: the step, or the last one before an evaluation.
            quarantined: of that step or evaluation.

        Raises:
            OSError: the disk is full or refuses.
        """
        if quarantined and "quarantine" not in self._files:
            self._files["quarantine"] = JsonLines(self.run_dir / "quarantine.jsonl")
        for request in quarantined:
            line = {"v": 1, "step": step, "time": time.time(), "attempt": self.attempt, **asdict(request)}
            self._files["quarantine"].append(line)
            self.event("quarantine", f"{request.request_id} could not be sampled: {request.error}", {"step": step})

    def write_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Add a line to metrics.jsonl.

        Raises:
            ValueError: a name that the table lacks.
            OSError: the disk is full or refuses.
        """
        for name in values:
            lookup(name)
        self._step = step
        self._files["metrics"].append({"v": 1, "step": step, "time": time.time(), "attempt": self.attempt, **values})
        self._mirrors.write(step, values)

    def event(self, kind: str, message: str, fields: Mapping[str, object] | None = None) -> None:
        """Add a line to events.jsonl: an actor went down, weights were published, a checkpoint was saved, ..."""
        if kind == "alert":
            log.warning("%s", alert_line({"message": message} | dict(fields or {})))
        else:
            log.info("%s: %s", kind, message)
        if fields and kind == "actor":
            (self.gone.add if fields["state"] == "down" else self.gone.discard)(str(fields["actor"]))
        line = {"v": 1, "time": time.time(), "attempt": self.attempt, "kind": kind, "message": message}
        self._files["events"].append(line | dict(fields or {}))
        self._mirrors.event(kind, fields or {})

    def save_evaluation_image(self, image: NDArray[np.uint8]) -> str:
        """Write a picture once, named by its content, and return its path inside the run directory."""
        digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
        path = self.run_dir / "evaluations" / "images" / f"{digest[:20]}.webp"
        if not path.exists():
            write_atomic(path, encode_webp(image), sync=False)
        return str(path.relative_to(self.run_dir))

    def write_evaluation(self, step: int, document: Mapping[str, object]) -> Path:
        """Write evaluations/step_<step>.json whole or not at all.

        Raises:
            OSError: the disk is full or refuses.
        """
        path = self._evaluation_path(step)
        document = {"v": 1, "step": step, "time": time.time(), "attempt": self.attempt, **document}
        write_atomic(path, encode_line(document))
        self.event("evaluation", f"evaluated after step {step}", {"step": step, "file": path.name})
        return path

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after this step was written."""
        return self._evaluation_path(step).exists()

    def _evaluation_path(self, step: int) -> Path:
        return self.run_dir / "evaluations" / f"step_{step:06d}.json"

    @property
    def onsets(self) -> list[int]:
        """Steps at which learning went wrong, by the sentinels; a checkpoint from before each is worth keeping."""
        return [] if self.sentinels is None else self.sentinels.onsets

    def sync(self) -> None:
        """Make all lines so far survive a power cut; call it with each checkpoint."""
        for file in self._files.values():
            file.sync()

    def end(self, status: Status, reason: str = "") -> None:
        """Record how the run ended and close the files. Later calls change nothing."""
        if self._ended:
            return
        self._ended = True
        try:
            self.event("end", reason or status, {"status": status})
            if self._accepted:
                self._set_status(status, reason)
            self.sync()
            if status != "finished":
                warn_of_alerts(self.run_dir)
        finally:
            with suppress(OSError):  # a mirror's failure is an event, and the disk may be full
                self._mirrors.close()
            for file in self._files.values():
                file.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end("finished")
            return
        # The run's own error matters more than a disk too full to note it.
        with suppress(OSError):
            refusing = None if isinstance(error, StoppedByAlertError) else refusing_sentinel(error)
            if refusing is not None and not self._ended:
                fields = alert_fields(refusing, self._step + 1) | {"severity": "stop"}
                self.event("alert", str(error), fields)
            self.end("failed" if isinstance(error, Exception) else "interrupted", f"{type(error).__name__}: {error}")

    def _set_status(self, status: Status, reason: str = "") -> None:
        self._run |= {"status": status, "reason": reason, "updated": _now()}
        write_atomic(self.run_dir / "run.json", json.dumps(self._run, indent=1, ensure_ascii=False).encode())


def _read_run(run_dir: Path, resume: bool) -> dict[str, Any]:
    """run.json of the run that is there, or {} for a new directory."""
    path = run_dir / "run.json"
    if path.exists() and not resume:
        raise RunDirError(
            f"run directory {run_dir}: expected a new or empty folder; got one that holds a run; go on with "
            f"--resume {run_dir}, or set another train.run_dir"
        )
    if not path.exists():
        _refuse_strangers(run_dir)
        return {}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = {"created": before["created"], "id": before["id"], "attempt": int(before["attempt"])}
        return kept | {key: before[key] for key in ("forked_from",) if key in before}
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"run directory {run_dir}: expected a run.json with id, created and attempt; got {error!r}; restore the "
            "file, or start in another train.run_dir"
        ) from error


def _refuse_strangers(run_dir: Path) -> None:
    """Refuse a folder that holds something other than a run; asked before anything is put there, too."""
    if not run_dir.exists() or (run_dir / "run.json").exists():
        return
    if strangers := sorted(item.name for item in run_dir.iterdir() if item.name != "lock"):
        raise RunDirError(
            f"run directory {run_dir}: expected a new or empty folder, or one with a run.json; got "
            f"{', '.join(strangers[:5])}; set another train.run_dir"
        )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
