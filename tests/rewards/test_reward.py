import copy
from importlib import import_module
from typing import get_args

import numpy as np
import pytest

from tests.rewards.groups import answers, question
from unirl.config import RewardConfig, RewardName, RewardsConfig
from unirl.config_rules import ConfigError, Problem
from unirl.rewards.accuracy import AccuracyReward
from unirl.rewards.lab_verifier import LabVerifierReward
from unirl.rewards.reward import build_reward, check_rewards, combine
from unirl.types import RewardScores

GROUP = answers(question(), ["a", "b", "c"])


def scores(values, judged=(True, True, True)):
    return RewardScores(values=np.array(values, np.float32), judged=np.array(judged))


def test_rewards_are_built_by_name_with_their_options():
    assert isinstance(build_reward("accuracy", RewardConfig(options={"answer_format": "free"})), AccuracyReward)
    assert isinstance(build_reward("lab_verifier", RewardConfig()), LabVerifierReward)


def test_every_reward_that_may_be_named_can_be_found():
    for name in get_args(RewardName):
        assert callable(import_module(f"unirl.rewards.{name}").build)


def test_an_unknown_name_or_option_is_named():
    with pytest.raises(ConfigError, match=r"hps .*there are accuracy, hpsv2, lab_verifier"):
        build_reward("hps", RewardConfig())
    with pytest.raises(ConfigError, match=r"accuracy\.options\.formt .*its options: answer_format"):
        build_reward("accuracy", RewardConfig(options={"formt": "free"}))


def test_everything_that_rewards_would_fail_on_is_said_at_once(tmp_path):
    accuracy = RewardConfig(options={"formt": "free"})
    hpsv2 = RewardConfig(options={"checkpoint": str(tmp_path / "absent.pt"), "precison": "float16"})
    with pytest.raises(ConfigError) as caught:
        check_rewards(RewardsConfig(understanding={"accuracy": accuracy}, generation={"hpsv2": hpsv2}))
    assert {problem.key: problem.rule for problem in caught.value.problems} == {
        "rewards.understanding.accuracy.options.formt": "is not an option of this reward",
        "rewards.generation.hpsv2.options.precison": "is not an option of this reward",
        "rewards.generation.hpsv2.options.checkpoint": "must be an existing file",
    }
    for value in (5, ["a"], None):
        with pytest.raises(ConfigError, match=r"hpsv2\.options\.checkpoint .*must be an existing file"):
            check_rewards(RewardsConfig(generation={"hpsv2": RewardConfig(options={"checkpoint": value})}))
    with pytest.raises(ConfigError, match=r"rewards\.generation\.hpsv2\.options\.checkpoint .*must be given"):
        check_rewards(RewardsConfig(generation={"hpsv2": RewardConfig()}))


def test_values_of_options_are_tried_before_anything_starts():
    accuracy = RewardConfig(options={"answer_format": "loose"})
    with pytest.raises(ConfigError, match=r"understanding\.accuracy\.options .*expected answer_format tagged or free"):
        check_rewards(RewardsConfig(understanding={"accuracy": accuracy}))


def test_rewards_that_fit_pass(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    for checkpoint in (str(tmp_path / "weights.pt"), "???"):
        check_rewards(RewardsConfig(generation={"hpsv2": RewardConfig(options={"checkpoint": checkpoint})}))
    check_rewards(RewardsConfig(generation={"lab_verifier": RewardConfig(), "hpsv2": RewardConfig(weight=0)}))


def test_the_error_survives_the_way_between_processes():
    error = copy.copy(ConfigError([Problem("a", 1, "must be 2", "set 2")]))  # by __reduce__, as Ray sends it
    assert error.problems == (Problem("a", 1, "must be 2", "set 2"),)


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
