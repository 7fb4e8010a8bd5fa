"""What has become of a run, by its own files and its lock: one word for the dashboard and for `unirl runs`."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unirl.config import MonitoringConfig
from unirl.monitoring.folder_lock import is_locked
from unirl.run_files import last_record

WRITTEN = ("run.json", "metrics.jsonl", "used_pairs.jsonl", "pairs.jsonl", "events.jsonl")
"""Files that a run writes as it gets on."""
GONE = ("stalled", "killed")
"""States of a run that says it is running and is not."""
LONG_STEP = 3.0
"""A step that takes so many times the usual counts as stalled, if that is longer than `monitoring.stall_after_s`."""
_WAITING = ("stall", "alert", "alert over")
"""Kinds of event that say that nothing happens, or may come while nothing does."""


def state_now(folder: Path, run: Mapping[str, Any], settings: Mapping[str, Any], usual_step_s: float | None) -> str:
    """What run.json says (running, finished, interrupted, failed), or else one of three words.

    - killed: it says running, and nobody holds its lock. Seen on the machine that the run is on; elsewhere locks say
      nothing.
    - stalled: it says running, and nothing came of it for too long. Heartbeats and the word that nothing happens are no
      progress.
    - starting: somebody holds its lock, and no step is to come yet.

    Args:
        folder: the run directory.
        run: its run.json.
        settings: by dotted key.
        usual_step_s: seconds of a step of late; None where nobody knows.
    """
    said = run.get("status")
    status = said[:40] if isinstance(said, str) else "unknown"
    locked = is_locked(folder)
    if status != "running" and not locked:
        return status
    last_kind = last_record(folder, "events.jsonl").get("kind")
    if status != "running":
        return status if last_kind == "end" else "starting"
    if not locked and run.get("host") == socket.gethostname():
        return "killed"
    told = settings.get("monitoring.stall_after_s")
    patience = told if isinstance(told, int | float) else MonitoringConfig().stall_after_s
    files = [name for name in WRITTEN if not (name == "events.jsonl" and last_kind in _WAITING)]
    quiet_s = time.time() - max(modified(folder / name) for name in files)
    return "stalled" if quiet_s > max(patience, LONG_STEP * (usual_step_s or 0.0)) else "running"


def modified(path: Path) -> float:
    """Unix time of the last write; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
