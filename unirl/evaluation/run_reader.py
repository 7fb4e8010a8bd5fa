"""Reads a run directory, also while it is being written or after its writer was killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unirl.evaluation.evaluate import EvaluationResult, from_document

_FILES = ("metrics", "pairs", "used_pairs", "events")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What a run directory says."""

    folder: Path
    run: dict[str, Any]
    """run.json."""
    metrics: tuple[dict[str, Any], ...]
    """One per step in order; of a step that was run again after a resume, the last."""
    pairs: tuple[dict[str, Any], ...]
    """The shown pairs with their completions."""
    used_pairs: tuple[dict[str, Any], ...]
    """One line per step: every pair with its weight and what it earned."""
    events: tuple[dict[str, Any], ...]
    evaluations: dict[int, EvaluationResult]
    """By step, in order."""
    num_bad_lines: int
    """Lines that could not be read: a killed writer tears at most one."""

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric where it is a number."""
        return [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]


def read_run(folder: Path) -> RunRecord:
    """Everything of a run but its images, journal and checkpoints.

    Raises:
        ValueError: no run directory, or a file of it that is damaged beyond a torn line.
    """
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run directory {folder}: expected a readable run.json; got {error}; name the folder that holds it"
        ) from error
    lines = {name: read_lines(folder / f"{name}.jsonl") for name in _FILES}
    shown = {(line.get("step"), line.get("pair_id")): line for line in lines["pairs"][0]}
    return RunRecord(
        folder=folder,
        run=run,
        metrics=_last_of_each_step(lines["metrics"][0]),
        pairs=tuple(shown.values()),
        used_pairs=_last_of_each_step(lines["used_pairs"][0]),
        events=tuple(lines["events"][0]),
        evaluations={int(path.stem[5:]): _evaluation(path) for path in sorted(folder.glob("evaluations/step_*.json"))},
        num_bad_lines=sum(bad for _, bad in lines.values()),
    )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and how many whole lines could not be read. No file gives no lines.

    What follows the last newline is still being written and not counted.
    """
    return _objects(path.read_bytes() if path.exists() else b"")


def _objects(data: bytes) -> tuple[list[dict[str, Any]], int]:
    records, bad = [], 0
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad += 1
    return records, bad


def read_tail(path: Path, num_bytes: int = 1 << 16) -> list[dict[str, Any]]:
    """The objects in the last bytes of a JSON-lines file, without reading the rest. No file gives none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - num_bytes)
        file.seek(start)
        data = file.read()
    return _objects(data[data.find(b"\n") + 1 :] if start else data)[0]


class Follower:
    """Reads a JSON-lines file as it grows. A file that shrinks was begun anew, and is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def read(self) -> list[dict[str, Any]]:
        """The objects of the lines that were ended since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if self._path.stat().st_size < self._position:
                self._position = 0
            file.seek(self._position)
            data = file.read()
        self._position += data.rfind(b"\n") + 1
        return _objects(data)[0]


def find_runs(folder: Path) -> list[Path]:
    """Every run directory at or below a folder, in no order; what lies inside a run is not searched."""
    if (folder / "run.json").is_file():
        return [folder]
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return [run for entry in inner if not entry.name.startswith(".") for run in find_runs(entry)]


def _last_of_each_step(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    by_step = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    return tuple(by_step[step] for step in sorted(by_step))


def _evaluation(path: Path) -> EvaluationResult:
    try:
        return from_document(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected an evaluation in JSON; got {error}; delete the file, or restore it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
