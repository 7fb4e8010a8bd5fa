"""The embedded lab's verifier as a reward: does the picture show what the caption asks for?"""

import numpy as np

from unirl.lab.verifier import parse_caption, verify
from unirl.types import GenerationSample, RewardScores, RolloutGroup


class LabVerifierReward:
    """(partial + exact) / 2 in [0, 1], judged from pixels alone. Details: exact and partial."""

    def score(self, group: RolloutGroup) -> RewardScores:
        """One value per picture; a prompt that is no lab caption judges none.

        Raises:
            ValueError: the group holds answers, or pictures that are not the lab's size.
        """
        sample = group.request.sample
        images = [t.image for t in group.trajectories if t.image is not None]
        if not isinstance(sample, GenerationSample) or len(images) != len(group.trajectories):
            raise ValueError(
                f"lab_verifier: expected pictures drawn from a caption; got the {group.request.task} request "
                f"{group.request.request_id}; list this reward under rewards.generation"
            )
        try:
            spec = parse_caption(sample.prompt)
        except ValueError as error:
            nothing = np.zeros(len(images), np.float32)
            return RewardScores(
                values=nothing,
                judged=np.zeros(len(images), np.bool_),
                details={"exact": nothing, "partial": nothing},
                problem=f"lab_verifier: {error}",
            )
        verdicts = [verify(spec, image) for image in images]
        return RewardScores(
            values=np.array([verdict.reward for verdict in verdicts], np.float32),
            judged=np.ones(len(images), np.bool_),
            details={
                "exact": np.array([verdict.exact for verdict in verdicts], np.float32),
                "partial": np.array([verdict.partial for verdict in verdicts], np.float32),
            },
        )


build = LabVerifierReward
