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


@pytest.fixture
def rewards(reward):
    return RewardsConfig(understanding={"accuracy": reward}, generation={"lab_verifier": reward})


@pytest.fixture
def pool(ray_session, rewards):
    pool = RewardPool(rewards, GroupReferences())
    yield pool
    pool.close()


def test_the_pool_scores_like_one_process(pool, rewards, groups):
    local = LocalRewards(rewards)
    expected = local.score(groups)
    local.close()
    scored = pool.score(iter(groups))
    assert [s.group.request.request_id for s in scored] == [s.group.request.request_id for s in expected]
    assert all(np.array_equal(a.rewards, b.rewards) for a, b in zip(scored, expected, strict=True))
    assert all(s.judged.all() for s in scored)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(pool, groups, kill_actor):
    before = pool.score(iter(groups))
    for workers in list(pool._workers.values()):
        kill_actor(workers[0])
    after = pool.score(iter(groups))
    assert pool.restarts == 2
    assert all(np.array_equal(a.rewards, b.rewards) for a, b in zip(before, after, strict=True))


def test_a_group_whose_worker_keeps_dying_is_masked_not_scored_0(pool, groups, kill_actor, monkeypatch):
    original = pool._submit

    def kill_and_submit(calls, call):
        kill_actor(pool._workers[call.key][call.slot % len(pool._workers[call.key])])
        original(calls, call)

    monkeypatch.setattr(pool, "_submit", kill_and_submit)
    scored = pool.score(iter(groups[:1]))
    assert not scored[0].judged.any()
    assert [s.problem for s in scored[0].components.values()] == ["its worker died"]
