"""Which checkpoints of a run are whole, and which are needed no more; reads names and COMMIT.json, needs no torch."""

import json
import logging
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

COMMIT = "COMMIT.json"
LATEST = "latest"
PREFIX = "step_"


def committed(root: Path) -> list[Path]:
    """Whole checkpoints from old to new; one that is broken is named in a warning and left out."""
    whole = []
    for folder in sorted(root.glob(f"{PREFIX}*")):
        problem = problem_of(folder)
        if problem:
            log.warning("checkpoint %s is skipped: %s", folder, problem)
        else:
            whole.append(folder)
    return whole


def problem_of(folder: Path) -> str:
    """What is wrong with a checkpoint; empty when it is whole."""
    try:
        files = json.loads((folder / COMMIT).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"expected a readable {COMMIT}; got {error}"
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            return f"expected {size} bytes in {name}; got {found}"
    return ""


def step_of(folder: Path) -> int:
    """Steps done when a checkpoint was saved."""
    return int(folder.name.removeprefix(PREFIX))


def prune(root: Path, keep: int, *, ruined_since: int | None = None) -> None:
    """Delete all but the newest checkpoints, and but the newest from before a run went wrong.

    Args:
        root: folder of the run's checkpoints.
        keep: how many; 0 keeps all.
        ruined_since: first step with which something is wrong; None while nothing is.
    """
    whole = committed(root) if keep else []
    sound = [folder for folder in whole if ruined_since is not None and step_of(folder) < ruined_since][-1:]
    for old in whole[:-keep]:
        if old not in sound:
            (old / COMMIT).unlink()
            shutil.rmtree(old)
