"""A batch of the lab's own prompts with drawn tokens, of both tasks and both kinds of pairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import unirl.lab
from tests.learner.conftest import SETTINGS
from unirl.config import ModelConfig
from unirl.lab.data import make_heldout
from unirl.learner.learner import scoring_of
from unirl.models.janus_pro import JanusPro
from unirl.types import TASKS, LearnerBatch, LearnerRow

LAB = Path(unirl.lab.__file__).parent / "checkpoints" / "janus"
SCORING = scoring_of(SETTINGS.sampling, SETTINGS.algorithm)


def lab_policy() -> JanusPro:
    return JanusPro.load(ModelConfig(), LAB)


def lab_batch(policy: JanusPro, num_rows: int = 12, seed: int = 0) -> LearnerBatch:
    """`num_rows` of either task, every third of a retrieved pair; old log-probabilities are nearly the policy's own."""
    generator = np.random.default_rng(seed)
    words = np.flatnonzero(policy.allowed_text_ids.numpy())
    rows = []
    for task, samples in zip(TASKS, make_heldout(24, 5), strict=True):
        for index in range(num_rows):
            sample = samples[index % len(samples)]
            length = int(generator.integers(2, 7)) if task == "understanding" else policy.num_image_tokens
            drawn = generator.choice(words if task == "understanding" else policy.num_codes, length)
            row = LearnerRow(
                task=task,
                prompt_ids=policy.encode(sample, SETTINGS.sampling).ids,
                image=sample.image if task == "understanding" else None,
                completion_ids=drawn.astype(np.int32),
                loss_mask=np.ones(length, bool),
                old_logprobs=np.zeros(length, np.float32),
                advantage=float(generator.normal()),
                pair_kind="retrieved" if index % 3 == 2 else "aligned",
            )
            with torch.no_grad():
                (scores,) = policy.score([row], SCORING)
            old = scores.logprobs[0].numpy() + 0.1 * generator.normal(size=length)
            rows.append(replace(row, old_logprobs=old.astype(np.float32)))
    return LearnerBatch(
        rows=tuple(rows),
        num_trajectories=dict.fromkeys(TASKS, num_rows),
        num_loss_tokens={task: sum(len(r.completion_ids) for r in rows if r.task == task) for task in TASKS},
        num_pairs=num_rows,
        policy_version=0,
    )
