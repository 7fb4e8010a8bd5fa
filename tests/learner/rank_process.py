"""One of several learner ranks, each a process of its own; `test_ranks.py` starts them and reads what they write."""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner import unequal_images
from tests.learner.conftest import SETTINGS
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner, scoring_of
from unirl.types import LearnerBatch

SCORING = scoring_of(SETTINGS.sampling, SETTINGS.algorithm)
NUM_STEPS = 3


def learner_of(place: RankPlace, *, masked: bool = False, **overrides: Any) -> Learner:
    """A learner of SETTINGS with some keys of its learner section changed; small micro-batches."""
    section = replace(SETTINGS.learner, max_tokens_per_micro_batch=40, **overrides)
    return Learner(TinyPolicy(masked=masked), replace(SETTINGS, learner=section), place)


def batch_of(step: int, *, masked: bool = False) -> LearnerBatch:
    """Seven rows, which two ranks cannot share evenly; a step of one task among them."""
    batch = tiny_batch(TinyPolicy(masked=masked), SCORING, num_rows=7, seed=step, off_policy=0.3)
    rows = tuple(row for row in batch.rows if step != 1 or row.task == "generation")
    return replace(batch, rows=rows)


def take_steps(learner: Learner, steps: range, *, masked: bool = False) -> list[dict[str, float]]:
    return [learner.update(batch_of(step, masked=masked), step) for step in steps]


def arrays_of(learner: Learner) -> dict[str, Any]:
    return {name: array for bucket in learner.weight_buckets() for name, array in bucket}


@contextmanager
def file_size_limit(num_bytes: int | None) -> Iterator[None]:
    """The operating system refuses this process any file beyond so many bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if num_bytes is None else num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failure_of(call: Any, *arguments: Any) -> str:
    """Type and message of the error that the call raises; empty when it raises none."""
    try:
        call(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def poison(learner: Learner, rank: int) -> str:
    """What every rank says when the policy of rank 1 alone holds a number that is none."""
    if rank == 1:
        with torch.no_grad():
            learner.policy.module.image_head.bias[0] = float("nan")
    return failure_of(learner.update, batch_of(0), 0)


def main(place: RankPlace, out: Path) -> None:
    """Run every case in this process group; weights and messages go to `out`."""
    report: dict[str, Any] = {}
    cases = [(stage, masked) for stage in (0, 1, 2, 3) for masked in (False, True) if not masked or stage >= 2]
    for stage, masked in cases:
        learner = learner_of(place, masked=masked, zero_stage=stage)
        name = f"stage{stage}{'_masked' if masked else ''}"
        report[name] = take_steps(learner, range(NUM_STEPS), masked=masked)
        arrays = arrays_of(learner)
        if place.rank == 0:
            np.savez(out / f"{name}.npz", **arrays)
        learner._engine.destroy()
    for stage in (2, 3):
        learner = learner_of(place, zero_stage=stage)
        take_steps(learner, range(1))
        folder = out / f"checkpoints{stage}"
        learner.save(folder, 1, {"at": 1})
        with file_size_limit(30_000 if place.rank == 1 else None):
            report[f"full{stage}"] = failure_of(learner.save, folder, 2, {"at": 2})
        resumed = learner_of(place, zero_stage=stage)
        report[f"restored{stage}"] = resumed.restore(folder)
        take_steps(resumed, range(1, NUM_STEPS))
        arrays = arrays_of(resumed)
        resumed.export(out / f"policy{stage}")
        if place.rank == 0:
            np.savez(out / f"resumed{stage}.npz", **arrays)
        learner._engine.destroy()
        resumed._engine.destroy()
    report["poisoned"] = poison(learner_of(place, zero_stage=0), place.rank)
    report["unequal_images"] = unequal_images.take_steps(place, out / "janus")
    (out / f"rank{place.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(
        RankPlace(rank=int(sys.argv[1]), world_size=int(sys.argv[2]), address="127.0.0.1", port=int(sys.argv[3])),
        Path(sys.argv[4]),
    )
