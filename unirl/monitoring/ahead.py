"""Finished rollouts on disk before anything is made of them, so that a crash samples none of them a second time.

One file per group in ahead/step_<step>/, written aside and renamed; numpy's own format without pickle. The step's
journal takes their place.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from unirl.monitoring.durable_files import write_atomic
from unirl.types import RolloutGroup, RolloutRequest, Trajectory

log = logging.getLogger(__name__)

ARRAYS = ("prompt_ids", "completion_ids", "loss_mask", "logprobs", "unmask_step", "image")
PLAIN = tuple(field.name for field in fields(Trajectory) if field.name not in ARRAYS)


class AheadFiles:
    """The groups of steps that are under way."""

    def __init__(self, run_dir: Path) -> None:
        """Use the folder ahead/ of a run directory."""
        self._folder = run_dir / "ahead"

    def write(self, step: int, group: RolloutGroup) -> None:
        """Keep a finished group, exact to the bit.

        Raises:
            OSError: the disk is full or refuses.
        """
        arrays: dict[str, Any] = {}
        for index, trajectory in enumerate(group.trajectories):
            values = {name: getattr(trajectory, name) for name in ARRAYS}
            arrays |= {f"{index}/{name}": value for name, value in values.items() if value is not None}
        plain = [{name: getattr(trajectory, name) for name in PLAIN} for trajectory in group.trajectories]
        facts = {"sample": group.request.sample.id, "trajectories": plain}
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        out = io.BytesIO()
        np.savez(out, **arrays)
        path = self._file(step, group.request)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, out.getvalue(), sync=False)

    def read(self, step: int, request: RolloutRequest) -> RolloutGroup | None:
        """The group that answers this very request; None when it was not finished, or its file is damaged."""
        path = self._file(step, request)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                trajectories = tuple(
                    _trajectory(plain, {name: arrays.get(f"{index}/{name}") for name in ARRAYS})
                    for index, plain in enumerate(facts["trajectories"])
                )
            if facts["sample"] != request.sample.id:
                return None
            return RolloutGroup(request=request, trajectories=trajectories)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            log.warning("%s is sampled again: its file cannot be used (%s)", request.request_id, error)
            return None

    def drop(self, step: int) -> None:
        """Forget a step that has its journal now."""
        shutil.rmtree(self._step(step), ignore_errors=True)

    def clear(self) -> None:
        """Forget everything: what was sampled belongs to other settings."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def sync(self) -> None:
        """Make what is kept survive a power cut; call it with each checkpoint."""
        for path in self._folder.glob("*/*.npz"):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _step(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}"

    def _file(self, step: int, request: RolloutRequest) -> Path:
        # Pair ids come from data; as a name of a file only their digest is safe.
        return self._step(step) / f"{hashlib.sha256(request.request_id.encode()).hexdigest()[:32]}.npz"


def _trajectory(plain: dict[str, Any], arrays: dict[str, Any]) -> Trajectory:
    # JSON knows lists only.
    return Trajectory(**{k: tuple(map(tuple, v)) if isinstance(v, list) else v for k, v in plain.items()}, **arrays)
