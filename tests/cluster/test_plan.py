from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from unirl.cluster.plan import (
    PlacementError,
    actor_plan,
    check_plan,
    count_parameters,
    machine_resources,
    render_plan,
    shortages,
    total_resources,
)
from unirl.config import ClusterConfig, LearnerConfig, ModelConfig, RewardConfig, RewardsConfig, RlConfig


def test_the_headers_give_the_number_of_weights(checkpoint):
    assert count_parameters(checkpoint) == sum(a.size for a in load_file(checkpoint / "model.safetensors").values())


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors.*got none"):
        count_parameters(tmp_path)


def test_the_default_plan_names_every_actor_once():
    plan = actor_plan(RlConfig(), 1_000_000)
    roles = ["pairing", "learner", "rollout.text", "rollout.image", "reward.accuracy", "reward.lab_verifier"]
    assert [actor.role for actor in plan] == roles
    needed = total_resources(plan)
    assert (needed["CPU"], needed["GPU"]) == (0 + 1 + 1 + 1 + 0.5 + 0.5, 0)
    assert needed["memory"] == pytest.approx(6 * 0.8 + sum(actor.memory_gib - 0.8 for actor in plan))
    assert all(role in render_plan(plan) for role in roles)


def test_a_reward_of_weight_0_starts_no_actor():
    rewards = RewardsConfig(generation={"lab_verifier": RewardConfig(weight=0), "hpsv2": RewardConfig()})
    roles = [actor.role for actor in actor_plan(replace(RlConfig(), rewards=rewards), 1)]
    assert "reward.lab_verifier" not in roles
    assert "reward.hpsv2" in roles


def test_zero_stages_shard_what_they_should():
    """7e9 weights in bf16 on 4 ranks: 13.04 GiB of weights, gradients summed in float32, 78.2 GiB of float32 states."""

    def learner_gib(stage, num_gpus=1.0):
        learner = LearnerConfig(num_ranks=4, zero_stage=stage, num_gpus=num_gpus)
        config = replace(RlConfig(), model=ModelConfig(dtype="bfloat16"), learner=learner)
        return next(a.memory_gib for a in actor_plan(config, 7_000_000_000) if a.role == "learner") - 0.8

    weights, states = 7e9 * 2 / 2**30, 7e9 * 12 / 2**30
    assert learner_gib(0) == pytest.approx(2 * weights + states)
    assert learner_gib(1) == pytest.approx(3 * weights + states / 4)
    assert learner_gib(2) == pytest.approx(weights + 2 * weights / 4 + states / 4)
    assert learner_gib(3) == pytest.approx((3 * weights + states) / 4)
    # Without a GPU the copies by which gradients are told apart lie in the same memory.
    assert learner_gib(1, num_gpus=0) - learner_gib(1) == pytest.approx(3 * 7e9 * 4 / 2**30)
    assert learner_gib(2, num_gpus=0) - learner_gib(2) == pytest.approx(3 * 7e9 * 4 / 2**30 / 4)


def test_what_a_machine_lacks_is_named_by_kind():
    plan = actor_plan(replace(RlConfig(), learner=LearnerConfig(num_ranks=200)), 1_000_000)
    assert shortages(plan, {"CPU": 8, "GPU": 0, "memory": 24.0}) == [
        "CPU 203 needed, 8 present",
        f"memory {total_resources(plan)['memory']:.4g} GiB needed, 24 GiB present",
    ]
    assert shortages(plan, {"CPU": 8}) == ["CPU 203 needed, 8 present"], "a cluster does not say its memory"
    assert shortages(plan, {"CPU": 203, "memory": 1000.0}) == []


def test_a_machine_announces_some_cpus_for_each_core_or_what_it_is_told(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert machine_resources(ClusterConfig())["CPU"] == 12
    assert machine_resources(ClusterConfig(num_cpus=5))["CPU"] == 5
    assert 0.5 < machine_resources(ClusterConfig())["memory"] < 1e5


def test_memory_which_is_estimated_is_refused_only_when_far_too_little():
    plan = actor_plan(RlConfig(), 1_000_000)
    need = total_resources(plan)["memory"]
    check_plan(plan, {"CPU": 4, "memory": 0.6 * need})
    with pytest.raises(PlacementError, match=r"memory .* GiB needed"):
        check_plan(plan, {"CPU": 4, "memory": 0.4 * need})
