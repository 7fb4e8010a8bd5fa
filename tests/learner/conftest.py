from dataclasses import replace

import pytest

from unirl.config import AlgorithmConfig, ImageSampling, LearnerConfig, SamplingConfig, TextSampling
from unirl.learner.engine import RankPlace
from unirl.learner.learner import Learner, LearnerSettings

SETTINGS = LearnerSettings(
    learner=LearnerConfig(lr=1e-3, warmup_steps=0),
    algorithm=AlgorithmConfig(),
    sampling=SamplingConfig(text=TextSampling(temperature=0.9), image=ImageSampling(guidance_scale=1.5)),
    num_steps=10,
)


@pytest.fixture
def make_learner():
    """Learners of one rank in this process; keywords of the algorithm and the learner sections override SETTINGS."""
    made = []

    def make(policy, *, reference=None, **overrides):
        algorithm = {key: value for key, value in overrides.items() if hasattr(AlgorithmConfig(), key)}
        learner = {key: value for key, value in overrides.items() if key not in algorithm}
        settings = replace(
            SETTINGS,
            algorithm=replace(SETTINGS.algorithm, **algorithm),
            learner=replace(SETTINGS.learner, **learner),
        )
        made.append(Learner(policy, settings, RankPlace(), reference=reference))
        return made[-1]

    yield make
    for learner in made[:-1]:
        learner._engine.destroy()
    if made:
        made[-1].close()
