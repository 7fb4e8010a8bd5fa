"""Reads a run directory, also while it is being written or after its writer was killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unirl.evaluation.evaluate import EvaluationResult, from_document
from unirl.run_files import read_lines

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
