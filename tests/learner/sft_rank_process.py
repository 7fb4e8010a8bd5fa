"""One of two ranks that fine-tune on conversations; `test_sft_ranks.py` starts them and reads what they write."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.learner.test_sft_learner import SETTINGS
from tests.sequences import random_sequences
from unirl.config import ModelConfig
from unirl.learner.engine import RankPlace
from unirl.learner.sft_learner import SftLearner
from unirl.models import anole

NUM_STEPS = 3


def learner_of(place: RankPlace, folder: Path, **overrides: Any) -> SftLearner:
    section = replace(SETTINGS.learner, **overrides)
    loss = replace(SETTINGS.loss, rows_at_once=10)  # ranks with unlike numbers of targets must stay in step
    return SftLearner(
        anole.load_interleaved(ModelConfig(family="anole"), folder),
        replace(SETTINGS, learner=section, loss=loss),
        place,
    )


def take_steps(learner: SftLearner, steps: range) -> list[dict[str, float]]:
    """The last step has text only, and fewer sequences than two ranks have rows."""
    batches = [random_sequences(learner.policy.layout, 9, seed=step) for step in range(NUM_STEPS - 1)]
    batches.append(random_sequences(learner.policy.layout, 1, seed=9, text_only=True))
    return [learner.update(learner.prepare(batches[step]), step) for step in steps]


def arrays_of(learner: SftLearner) -> dict[str, Any]:
    return {name: array for bucket in learner._engine.weight_buckets(0) for name, array in bucket}


def main(place: RankPlace, out: Path) -> None:
    report: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        learner = learner_of(place, out / "anole", zero_stage=stage, activation_checkpointing=stage == 3)
        report[f"stage{stage}"] = take_steps(learner, range(NUM_STEPS))
        arrays = arrays_of(learner)
        if place.rank == 0:
            np.savez(out / f"stage{stage}.npz", **arrays)
        if stage == 3:
            learner.export(out / "policy3")
        learner._engine.destroy()
    (out / f"rank{place.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(
        RankPlace(rank=int(sys.argv[1]), world_size=int(sys.argv[2]), address="127.0.0.1", port=int(sys.argv[3])),
        Path(sys.argv[4]),
    )
