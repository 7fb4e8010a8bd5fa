"""Which checkpoints of a run are whole, and which are needed no more; reads names and COMMIT.json, needs no torch."""

import json
import logging
import shutil
from collections.abc import Sequence
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


def prune(root: Path, keep: int, *, onsets: Sequence[int] = ()) -> None:
    """Delete all but the newest checkpoints, and but the newest from before each time that a run went wrong.

    Args:
        root: folder of the run's checkpoints.
        keep: how many; 0 keeps all.
        onsets: first steps with which something was wrong.
    """
    whole = committed(root) if keep else []
    sound = [found for onset in onsets for found in [own for own in whole if step_of(own) < onset][-1:]]
    for old in whole[:-keep]:
        if old not in sound:
            (old / COMMIT).unlink()
            shutil.rmtree(old)
