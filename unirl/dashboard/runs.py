"""The runs below a folder, and the name of each in an address."""

import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from unirl.dashboard.run_view import RunView
from unirl.run_files import find_runs

MAX_RUNS = 1000
MAX_HELD = 6
"""Runs whose tables stay in memory."""
LOOK_EVERY_S = 2.0


def quoted(name: str) -> str:
    """A run's id as one segment of a path: "~" becomes "~0", and then "/" becomes "~1", so that no two are the same."""
    return name.replace("~", "~0").replace("/", "~1")


class Runs:
    """Every run below a folder; the folder may itself be a run, whose id then is the folder's name.

    Runs are looked up among those that were found, so that no address leads to any other place. Links to folders are
    not followed.
    """

    def __init__(self, folder: Path) -> None:
        """Look for runs.

        Args:
            folder: the runs' folder, or a run.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        if not folder.is_dir():
            raise FileNotFoundError(
                f"dashboard: expected a folder of runs; got {folder}; name the folder that holds them"
            )
        self._folder = folder.resolve()
        self._turn = threading.Lock()
        self._views: dict[str, RunView] = {}
        self._segments: dict[str, str] = {}
        self._seen: dict[str, None] = {}  # segments that were asked for and found
        self._held: OrderedDict[str, RunView] = OrderedDict()
        self._looked = float("-inf")
        self._look()

    def list(self) -> list[dict[str, Any]]:
        """Id and state of each run, the newest first."""
        with self._turn:
            self._look()
            views = [(name, view) for name, view in self._views.items() if view.is_there]
        rows = [{"id": name} | view.brief() for name, view in views]
        return sorted(rows, key=lambda row: row["updated"] or 0.0, reverse=True)

    def find(self, segment: str) -> RunView | None:
        """The run that a segment of a path names, see `quoted`; None when there is none.

        Raises:
            FileNotFoundError: there was one, and its folder is gone.
        """
        with self._turn:
            if segment not in self._segments:
                self._look()
            name = self._segments.get(segment)
            if segment in self._seen and (name is None or not self._views[name].is_there):
                raise FileNotFoundError("expected a run's folder; got none: this run's folder is gone; choose another")
            if name is None:
                return None
            self._seen[segment] = None
            if len(self._seen) > MAX_RUNS:
                del self._seen[next(iter(self._seen))]
            view = self._held[name] = self._views[name]
            self._held.move_to_end(name)
            idle = self._held.popitem(last=False)[1] if len(self._held) > MAX_HELD else None
        if idle is not None:
            idle.forget()
        return view

    def _look(self) -> None:
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        before = self._views
        self._views = {}
        for folder in find_runs(self._folder):
            name = self._folder.name or "run" if folder == self._folder else folder.relative_to(self._folder).as_posix()
            self._views[name] = before.get(name) or RunView(folder)
            if len(self._views) == MAX_RUNS:
                break
        self._segments = {quoted(name): name for name in self._views}
