import shutil
from dataclasses import replace

import pytest

from unirl.cluster.placement import place, planned_bundles
from unirl.cluster.plan import PlacementError, actor_plan, check_plan
from unirl.cluster.rollout_pool import RolloutPool
from unirl.cluster.runtime import wait_until_up
from unirl.config import ClusterConfig, LearnerConfig, RlConfig, RolloutConfig, WorkersConfig


def test_separate_bundles_hold_the_learner_alone():
    assert planned_bundles(RlConfig()) == [{"CPU": 1.0}]


def test_colocated_workers_are_dealt_out_over_the_ranks():
    config = replace(
        RlConfig(),
        cluster=ClusterConfig(placement="colocated"),
        learner=LearnerConfig(num_ranks=2, num_gpus=0.5),
        rollout=RolloutConfig(
            text=WorkersConfig(num_workers=1, num_gpus=0.25), image=WorkersConfig(num_workers=2, num_gpus=0.25)
        ),
    )
    assert planned_bundles(config) == [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 0.75}]


def test_too_small_a_cluster_is_refused_with_both_numbers_and_the_plan():
    config = replace(RlConfig(), learner=LearnerConfig(num_ranks=8, num_gpus=1))
    with pytest.raises(PlacementError, match=r"GPU 8 needed, 2 present.*num_workers(?s:.*)rollout\.text"):
        check_plan(actor_plan(config, 1), {"CPU": 16, "GPU": 2})


def test_bundles_that_never_become_free_are_an_error_not_a_wait(ray_session):
    config = replace(
        RlConfig(), learner=LearnerConfig(num_cpus=1000), cluster=ClusterConfig(start_timeout_s=1.0)
    )  # fmt: skip
    with pytest.raises(PlacementError, match=r"expected bundles .*1000.* within 1 s; got .* available"):
        place(config)
    assert ray_session.available_resources()["CPU"] > 0


def test_an_actor_that_cannot_be_scheduled_is_named_after_the_patience(ray_session, alone, checkpoint):
    workers = replace(alone.rollout.both, num_cpus=1000)
    pool = RolloutPool(replace(alone, rollout=replace(alone.rollout, both=workers)), checkpoint, None)
    with pytest.raises(PlacementError, match=r"up within 2 s .*no answer from rollout\.both 0, with .* free"):
        wait_until_up(pool.starting(), 2.0)
    pool.close()


def test_an_actor_that_fails_to_start_says_why(ray_session, alone, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    pool = RolloutPool(alone, broken, None)
    with pytest.raises(RuntimeError, match=r"(?s)expected rollout\.both 0 to start.*model\.safetensors"):
        wait_until_up(pool.starting(), 120.0)
    pool.close()
