import time
from dataclasses import replace

import numpy as np
import pytest

from unirl.cluster.reward_pool import RewardPool
from unirl.cluster.rollout_pool import GroupReferences
from unirl.config import RewardsConfig
from unirl.jobs.local import LocalRewards, LocalRollouts


@pytest.fixture(scope="session")
def groups(checkpoint, requests_of):
    from unirl.config import RlConfig, RolloutConfig

    config = RlConfig(rollout=RolloutConfig(backend="torch"))
    return list(LocalRollouts(config, checkpoint).sample(requests_of(3, 2), config.rollout.sampling))


@pytest.fixture(scope="module")
def rewards(reward):
    return RewardsConfig(understanding={"accuracy": reward}, generation={"lab_verifier": reward})


@pytest.fixture(scope="module")
def pool(ray_session, rewards):
    """Two workers for all tests, of which each leaves them alive."""
    pool = RewardPool(rewards, GroupReferences())
    yield pool
    pool.close()


def test_the_pool_scores_like_one_process(pool, rewards, groups):
    local = LocalRewards(rewards)
    expected = local.score(groups)
    local.close()
    pool.take_activities()
    begin = time.perf_counter()
    scored = pool.score(iter(groups))
    activities, end = pool.take_activities(), time.perf_counter()
    assert len(activities) == len(groups)
    assert {activity.role for activity in activities} == {"reward.accuracy", "reward.lab_verifier"}
    assert all(begin < a.begin < a.busy_until <= a.end < end and a.seconds["reward"] > 0 for a in activities)
    assert [s.group.request.request_id for s in scored] == [s.group.request.request_id for s in expected]
    assert all(np.array_equal(a.rewards, b.rewards) for a, b in zip(scored, expected, strict=True))
    assert all(s.judged.all() for s in scored)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(pool, groups, kill_actor):
    before = pool.score(iter(groups))
    for workers in list(pool._workers.values()):
        kill_actor(workers[0])
    after = pool.score(iter(groups))
    assert (pool.take_restarts(), pool.take_restarts()) == (2, 0)
    assert all(np.array_equal(a.rewards, b.rewards) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def warm(ray_session, reward, groups):
    """A pool that has answered, and gives a call 0.1 seconds and the pool's margin."""
    quick = replace(reward, timeout_s=0.1, max_attempts=1)
    pool = RewardPool(RewardsConfig(understanding={"accuracy": quick}), GroupReferences())
    pool.score(group for group in groups if group.request.task == "understanding")
    yield pool
    pool.close()


@pytest.fixture
def impatient(warm, monkeypatch):
    """Its patience with a call is about two seconds."""
    monkeypatch.setattr("unirl.cluster.reward_pool.MARGIN_S", 2.0)
    monkeypatch.setattr("unirl.cluster.reward_pool.TICK_S", 0.5)
    return warm


@pytest.fixture
def answers(groups):
    return [group for group in groups if group.request.task == "understanding"]


def test_a_stream_slower_than_any_patience_loses_nothing(impatient, answers):
    def slowly():
        for group in answers[:2]:
            yield group
            time.sleep(3.0)

    scored = impatient.score(slowly())
    assert len(scored) == 2
    assert all(s.judged.all() for s in scored)
    assert impatient.take_restarts() == 0


def test_a_worker_that_hangs_is_replaced_and_only_its_present_group_is_masked(impatient, answers, monkeypatch):
    handle = impatient._workers["understanding", "accuracy"][0]
    handle.__ray_call__.remote(lambda self: time.sleep(600))
    original = impatient._replace

    def replace_and_be_patient(key, worker):
        monkeypatch.setattr("unirl.cluster.reward_pool.MARGIN_S", 60.0)  # the new worker must start
        return original(key, worker)

    monkeypatch.setattr(impatient, "_replace", replace_and_be_patient)
    scored = impatient.score(iter(answers))
    assert impatient.take_restarts() == 1
    assert [s.components["accuracy"].problem for s in scored].count("its worker hung") == 1
    assert [bool(s.judged.all()) for s in scored].count(False) == 1


def test_a_worker_that_keeps_dying_masks_its_group_and_never_scores_it_0(pool, groups, kill_actor, monkeypatch):
    submit = pool._submit

    def kill_and_submit(calls, call):
        kill_actor(call.worker)
        submit(calls, call)

    monkeypatch.setattr(pool, "_submit", kill_and_submit)
    scored = pool.score(iter(groups[:1]))
    assert not scored[0].judged.any()
    assert [s.problem for s in scored[0].components.values()] == ["its worker died"]
