"""One of two ZeRO-3 ranks whose micro-batches hold unequal numbers of images; `rank_process.py` takes the steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.janus_checkpoints import SIDE
from tests.learner.conftest import SETTINGS
from unirl.config import ModelConfig
from unirl.learner import engine
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner
from unirl.models.janus_pro import IMAGES_AT_ONCE, JanusPro
from unirl.types import LearnerBatch, LearnerRow, UnderstandingSample

_config_of = engine.deepspeed_config


def partition_everything(*arguments: Any) -> dict[str, Any]:
    """DeepSpeed keeps small weights whole on each rank, and all weights of this model are small."""
    settings = _config_of(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def batch_for(policy: JanusPro) -> LearnerBatch:
    """Rows alternate between the ranks: a picture of its own in each row of rank 0, one for all of rank 1."""
    generator = np.random.default_rng(0)
    pictures = list(generator.integers(0, 255, (IMAGES_AT_ONCE + 1, SIDE, SIDE, 3)).astype(np.uint8))
    sample = UnderstandingSample(
        id="q", image=pictures[0], question="what is on the mat ?", answer="cat", answer_type="text"
    )
    words = np.flatnonzero(policy.allowed_text_ids.numpy())
    rows = [
        LearnerRow(
            task="understanding", prompt_ids=policy.prompts.encode_understanding(sample), image=image,
            completion_ids=generator.choice(words, 4).astype(np.int32), loss_mask=np.ones(4, bool),
            old_logprobs=np.full(4, -3.0, np.float32), advantage=float(generator.normal()),
        )
        for own in pictures for image in (own, pictures[0])
    ]  # fmt: skip
    counts = {"understanding": len(rows), "generation": 0}
    tokens = {"understanding": 4 * len(rows), "generation": 0}
    return LearnerBatch(
        rows=tuple(rows), num_trajectories=counts, num_loss_tokens=tokens, num_pairs=len(rows), policy_version=0
    )


def take_steps(place: RankPlace, folder: Path) -> list[dict[str, float]]:
    """Two steps of a checkpoint, of which the second follows what DeepSpeed recorded of the first."""
    engine.deepspeed_config = partition_everything
    policy = JanusPro.load(ModelConfig(), folder)
    settings = replace(SETTINGS, learner=replace(SETTINGS.learner, zero_stage=3))
    learner = Learner(policy, settings, place)
    batch = batch_for(policy)
    return [learner.update(replace(batch, policy_version=step), step) for step in range(2)]
