"""One of two ranks that measure gradients by task; `test_task_gradients.py` starts them and reads what they write."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.learner.conftest import SETTINGS
from tests.learner.lab_rows import lab_batch, lab_policy
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner

BUDGET = 140
"""Tokens of a micro-batch, of which each task then has several."""


def main(place: RankPlace, out: Path) -> None:
    """What two steps say, and the weights after them, when they are measured and when not."""
    batch, report = lab_batch(lab_policy()), dict[str, Any]()
    stage = int((out / "stage").read_text())
    section = replace(SETTINGS.learner, zero_stage=stage, max_tokens_per_micro_batch=BUDGET, max_grad_norm=0.01)
    for every in (1, 0):
        learner = Learner(lab_policy(), replace(SETTINGS, learner=section, grad_cosine_every=every), place)
        steps = [learner.update(replace(batch, policy_version=step - 1), step) for step in (1, 2)]
        for _ in learner.weight_buckets():
            pass
        report[str(every)] = steps, learner.manifest().checksum if place.rank == 0 else ""
        learner._engine.destroy()
    (out / f"rank{place.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(
        RankPlace(rank=int(sys.argv[1]), world_size=int(sys.argv[2]), address="127.0.0.1", port=int(sys.argv[3])),
        Path(sys.argv[4]),
    )
