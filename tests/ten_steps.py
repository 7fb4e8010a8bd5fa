"""Ten steps of fine-tuning on a tiny checkpoint of every family, from the public layout through the learner back to it.

A process of its own, since DeepSpeed and the engines of other tests would share one process group.
"""

import json
import sys
from pathlib import Path

from tests.models.conversations import CASES, dialogues, written
from unirl.config import LearnerConfig, SftLossConfig
from unirl.learner.engine import RankPlace
from unirl.learner.sft_learner import SftLearner, SftSettings
from unirl.models.policy import load_interleaved

SETTINGS = SftSettings(
    learner=LearnerConfig(lr=3e-3, warmup_steps=0, max_tokens_per_micro_batch=256, zero_stage=0),
    loss=SftLossConfig(),
    batching="packed",
    num_steps=10,
)


def main(out: Path) -> None:
    """For each case its checkpoint `public`, the fine-tuned one `tuned` and `losses.json`, of each step."""
    for case in CASES:
        config, public = written(out / case / "public", case)
        learner = SftLearner(load_interleaved(config, public), SETTINGS, RankPlace())
        sequences = dialogues(learner.policy.layout)
        steps = [learner.update(learner.prepare(sequences), step) for step in range(1, 11)]
        learner.export(out / case / "tuned")
        (out / case / "losses.json").write_text(json.dumps(steps))
        learner._engine.destroy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
