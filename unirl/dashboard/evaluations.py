"""The evaluations of a run: of each file its means with intervals, the items left where they are."""

import json
import re
from pathlib import Path
from typing import Any

from unirl.dashboard.metric_table import as_number
from unirl.run_files import Record, list_inside, read_inside

MAX_BYTES = 64 << 20
_FILE = re.compile(r"(step|heldout)_(\d{1,12})\.json", re.ASCII)


class Evaluations:
    """evaluations/ of one run, each file read once. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remember the run directory; `refresh` reads."""
        self._folder = folder
        self._found: dict[str, tuple[tuple[int, int], Record | None]] = {}

    def refresh(self) -> None:
        """Read files that are new or were replaced."""
        before, self._found = self._found, {}
        for name in filter(_FILE.fullmatch, list_inside(self._folder, "evaluations")):
            try:
                facts = (self._folder / "evaluations" / name).stat()
            except OSError:
                continue
            state = (facts.st_mtime_ns, facts.st_size)
            old_state, old = before.get(name, (None, None))
            self._found[name] = (state, old if old_state == state else self._read(name))

    @property
    def bad_files(self) -> int:
        """Files that could not be read."""
        return sum(tasks is None for _, tasks in self._found.values())

    def all(self) -> list[dict[str, Any]]:
        """Step and means of each evaluation, in order of the steps."""
        by_step: dict[int, Record] = {}
        for name, (_, tasks) in sorted(self._found.items()):
            if tasks is not None and (match := _FILE.fullmatch(name)):
                by_step.setdefault(int(match[2]), {}).update(tasks)
        return [{"step": step, "tasks": by_step[step]} for step in sorted(by_step)]

    def _read(self, name: str) -> Record | None:
        try:
            document = json.loads(read_inside(self._folder, f"evaluations/{name}", MAX_BYTES).decode())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        if name.startswith("step"):
            estimates = document.get("estimates")
            if not isinstance(estimates, dict):
                return None
            return {str(key): _estimate(value) for key, value in estimates.items() if isinstance(value, dict)}
        numbers = ((str(key), as_number(value)) for key, value in document.items() if "/" in str(key))
        return {key: {"value": n, "low": None, "high": None, "num": None} for key, n in numbers if n is not None}


def _estimate(value: Record) -> dict[str, Any]:
    names = {"value": "mean", "low": "low", "high": "high"}
    num = value.get("num")
    numbers = {name: as_number(value.get(field)) for name, field in names.items()}
    return numbers | {"num": num if type(num) is int else None}
