"""Checkpoints of a run: written aside, committed whole, found again, never half.

A checkpoint is a folder `step_00000012` with DeepSpeed's files (weights, optimizer), one file of random-number states
per rank, and COMMIT.json, which is written last and says what must be there. A folder without a fitting COMMIT.json
does not count, so a process may be killed at any moment.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from unirl.learner.commits import COMMIT, LATEST, PREFIX, committed

TEMPORARY = ".tmp-"


class DurableFiles(TorchCheckpointEngine):
    """DeepSpeed's reader and writer of files, made safe: synced to disk, and read without running any code.

    A failed write is kept in `problem` rather than raised, because the other ranks wait for this one at the end of
    the save.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""

    def save(self, state_dict: Any, path: str) -> None:
        """Write and sync one file."""
        try:
            with Path(path).open("wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch reports what it was doing; the error of the operating system stands behind that.
            cause = error if isinstance(error, OSError) else error.__context__ or error
            self.problem = self.problem or f"{Path(path).name}: {cause}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file; refuses any object but tensors, containers and DeepSpeed's few known classes."""
        with torch.serialization.safe_globals(_known_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _known_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def save_checkpoint(engine: Any, root: Path, *, step: int, layout: dict[str, Any], state: dict[str, Any]) -> None:
    """Commit weights, optimizer, random-number states and `state` as `root/step_<step>`. Every rank must call it.

    Args:
        engine: the DeepSpeed engine.
        root: folder of the run's checkpoints; shared by all nodes.
        step: steps done.
        layout: the settings that must be the same at resume, by key: each rank reads its own part of the optimizer.
        state: what else must come back at resume; JSON values only.

    Raises:
        OSError: something could not be written, for instance because the disk is full; earlier checkpoints are whole.
        TypeError: `state` holds something that JSON does not know.
    """
    commit = {"step": step, "layout": layout, "state": state}
    json.dumps(commit)
    temporary, folder = root / f"{TEMPORARY}{PREFIX}{step:08d}", root / f"{PREFIX}{step:08d}"
    files = engine.checkpoint_engine = DurableFiles()
    # A recovery script beside the checkpoints is not needed, and could fail on one rank only.
    engine._copy_recovery_script = lambda save_path: None
    _together(root, lambda: _fresh_folder(temporary))
    files.save(_random_states(), str(temporary / f"random_{dist.get_rank():05d}.pt"))
    engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    problem = f"rank {dist.get_rank()}: {files.problem}" if files.problem else ""
    _together(root, lambda: _publish(temporary, folder, commit), problem=problem)


def _together(root: Path, action: Callable[[], None], problem: str = "") -> None:
    """Run `action` on rank 0 unless some rank has a problem; raise the first problem on every rank."""
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [next(filter(None, problems), "")]
    if dist.get_rank() == 0:
        try:
            if not found[0]:
                action()
        except OSError as error:
            found[0] = str(error)
        if found[0]:
            for leftover in root.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        free = shutil.disk_usage(root if root.exists() else root.parent).free / 2**20
        raise OSError(
            f"checkpoint: expected to write {root}; got {found[0]} ({free:.0f} MiB free); free space there, or lower "
            "train.keep_checkpoints, and resume from the last committed checkpoint, which is whole"
        )


def _fresh_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _publish(temporary: Path, folder: Path, commit: dict[str, Any]) -> None:
    sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in temporary.rglob("*") if file.is_file()}
    _write_durably(temporary / COMMIT, json.dumps(commit | {"files": sizes}, indent=1))
    _sync_folder(temporary)
    replaced = folder.with_name(f"{TEMPORARY}replaced")
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    _write_durably(folder.parent / f"{LATEST}.new", folder.name)
    (folder.parent / f"{LATEST}.new").replace(folder.parent / LATEST)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(engine: Any, root: Path, *, layout: dict[str, Any]) -> dict[str, Any]:
    """Load the newest committed checkpoint in `root`, or that of the folder `root` itself; returns its `state`.

    Every rank must call it. The engine must be fresh: ZeRO-3 cannot load after it has trained. When the newest is
    looked for, folders of unfinished saves are removed.

    Raises:
        FileNotFoundError: no committed checkpoint.
        ValueError: it was written by another number of ranks, ZeRO stage or precision.
    """
    named = (root / COMMIT).is_file()
    found = [([root] if named else committed(root)[-1:]) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        raise FileNotFoundError(
            f"checkpoint: expected a committed checkpoint in {root}; got none; start the run without --resume"
        )
    folder = found[0][0]
    if dist.get_rank() == 0 and not named:
        for leftover in root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
    commit = json.loads((folder / COMMIT).read_text())
    if commit["layout"] != layout:
        raise ValueError(
            f"checkpoint {folder}: expected one written with {layout}; got {commit['layout']}; set these keys as in "
            "the checkpoint, or start a new run with model.path set to exported weights"
        )
    files = engine.checkpoint_engine = DurableFiles()
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    _restore_random_states(files.load(str(folder / f"random_{dist.get_rank():05d}.pt")))
    return commit["state"]


def _random_states() -> dict[str, Any]:
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
