import numpy as np
import pytest

from tests.rewards.groups import answers, question
from unirl.config import RewardConfig
from unirl.rewards.accuracy import AccuracyReward
from unirl.rewards.lab_verifier import LabVerifierReward
from unirl.rewards.reward import build_reward, combine
from unirl.types import RewardScores

GROUP = answers(question(), ["a", "b", "c"])


def scores(values, judged=(True, True, True)):
    return RewardScores(values=np.array(values, np.float32), judged=np.array(judged))


def test_rewards_are_built_by_name_with_their_options():
    assert isinstance(build_reward("accuracy", RewardConfig(options={"answer_format": "free"})), AccuracyReward)
    assert isinstance(build_reward("lab_verifier", RewardConfig()), LabVerifierReward)


def test_an_unknown_name_or_option_is_named():
    with pytest.raises(ValueError, match=r"accuracy, hpsv2, lab_verifier; got 'hps'"):
        build_reward("hps", RewardConfig())
    with pytest.raises(ValueError, match=r"accuracy\.options: expected answer_format.*got \['formt'\]; correct formt"):
        build_reward("accuracy", RewardConfig(options={"formt": "free"}))
    with pytest.raises(ValueError, match=r"hpsv2\.options: .*required: checkpoint; got \[\]; correct checkpoint"):
        build_reward("hpsv2", RewardConfig())


def test_components_are_summed_by_weight():
    combined = combine(GROUP, {"a": scores([1, 0, 1]), "b": scores([0.5, 0.25, 0])}, {"a": 1.0, "b": 2.0})
    assert combined.rewards.tolist() == [2, 0.5, 1]
    assert combined.judged.all()


def test_one_unjudged_component_masks_the_trajectory_only():
    half = scores([7, 0.25, 0], (False, True, True))
    combined = combine(GROUP, {"a": scores([1, 0, 1]), "b": half}, {"a": 1.0, "b": 2.0})
    assert combined.judged.tolist() == [False, True, True]
    assert combined.rewards.tolist() == [0, 0.5, 1]
    assert combined.components["a"].judged.all()
