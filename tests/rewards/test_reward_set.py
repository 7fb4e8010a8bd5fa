import random

import pytest

from tests.rewards.groups import EOS, answers, pictures, question
from unirl.config import RewardConfig, RewardsConfig
from unirl.lab.world import caption, make_scene, make_spec, render
from unirl.rewards.reward_set import RewardSet


def test_each_task_is_scored_by_its_own_rewards():
    rewards = RewardSet(RewardsConfig(generation={"lab_verifier": RewardConfig(weight=0.5)}))
    scored = rewards.score(answers(question(), [f"<answer> B </answer> {EOS}", "B"]))
    assert scored.rewards.tolist() == [1, 0]
    assert list(scored.components) == ["accuracy"]
    rng = random.Random(0)
    scene = make_scene(rng, make_spec(rng, "counting"))
    drawn = rewards.score(pictures(caption(scene.spec), [render(scene)]))
    assert drawn.rewards.tolist() == [0.5]
    assert list(drawn.components) == ["lab_verifier"]


def test_a_failing_reward_leaves_the_others_alone():
    config = RewardsConfig(understanding={"accuracy": RewardConfig(), "lab_verifier": RewardConfig(max_attempts=1)})
    scored = RewardSet(config).score(answers(question(), [f"<answer> B </answer> {EOS}"]))
    assert scored.judged.tolist() == [False]
    assert scored.components["accuracy"].values.tolist() == [1]
    assert "rewards.generation" in scored.components["lab_verifier"].problem


@pytest.mark.parametrize("settings", [{}, {"lab_verifier": RewardConfig(weight=0)}])
def test_a_task_without_rewards_is_refused(settings):
    with pytest.raises(ValueError, match=r"rewards\.generation: expected at least one reward"):
        RewardSet(RewardsConfig(generation=settings))
