import time
from dataclasses import replace

import numpy as np
import pytest

from unirl.cluster.rollout_pool import RolloutPool
from unirl.cluster.weight_sync import Publication
from unirl.jobs.local import LocalLearner, LocalRollouts
from unirl.rollout.units import units_of_work


@pytest.fixture(scope="module")
def pool(ray_session, config, checkpoint):
    """Two workers for all tests, since starting them takes most of the time; the last gives them other weights."""
    pool = RolloutPool(config, checkpoint, None)
    yield pool
    pool.close()


def tokens_of(groups):
    return {g.request.request_id: [t.completion_ids.tolist() for t in g.trajectories] for g in groups}


def test_units_hold_one_task_and_at_most_the_asked_size(requests_of):
    requests = requests_of(5, 3)
    units = units_of_work(requests, 7)
    assert [len(unit) for unit in units] == [2, 2, 1, 2, 2, 1]
    assert [request.task for request in units[0] + units[-1]] == ["generation"] * 2 + ["understanding"]
    assert sorted(r.request_id for unit in units for r in unit) == sorted(r.request_id for r in requests)


def test_two_workers_give_the_tokens_of_one_process(pool, config, checkpoint, requests_of):
    requests = requests_of(4, 2)
    alone = tokens_of(LocalRollouts(config, checkpoint).sample(requests, config.rollout.sampling))
    assert tokens_of(pool.sample(requests, config.rollout.sampling)) == alone


def test_killed_workers_are_replaced_and_every_request_is_answered_once(pool, config, requests_of, kill_actor):
    requests = requests_of(8, 2)
    stream = pool.sample(requests, config.rollout.sampling)
    groups = [next(stream)]
    for worker in list(pool._workers):
        kill_actor(worker.handle)
    groups += stream
    assert sorted(g.request.request_id for g in groups) == sorted(r.request_id for r in requests)
    assert (pool.take_restarts(), pool.take_restarts()) == (2, 0)
    assert tokens_of(groups) == tokens_of(pool.sample(requests, config.rollout.sampling))


def test_a_hung_worker_is_replaced_and_a_unit_that_always_fails_stops_the_run(
    ray_session, alone, checkpoint, requests_of, monkeypatch
):
    monkeypatch.setattr("unirl.cluster.rollout_pool.TICK_S", 0.5)
    config = replace(alone, rollout=replace(alone.rollout, timeout_s=0.0, max_attempts=2))
    pool = RolloutPool(config, checkpoint, None)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"failed 2 times; last error: no answer within 0 s"):
        list(pool.sample(requests_of(1, 1), config.rollout.sampling))
    assert time.monotonic() - started < 60
    pool.close()


def test_a_task_without_workers_is_named(ray_session, alone, checkpoint, requests_of):
    rollout = replace(alone.rollout, text=alone.rollout.both, both=replace(alone.rollout.both, num_workers=0))
    pool = RolloutPool(replace(alone, rollout=rollout), checkpoint, None)
    with pytest.raises(RuntimeError, match=r"expected a worker for \['generation'\]"):
        list(pool.sample(requests_of(1, 1), alone.rollout.sampling))
    pool.close()


def test_groups_lie_in_the_store_so_that_images_are_not_sent_again(pool, config, requests_of, ray_session):
    groups = list(pool.sample(requests_of(2, 2), config.rollout.sampling))
    for group in groups:
        reference, index = pool.references.take(group)
        stored = ray_session.get(reference)[index]
        assert stored.request.request_id == group.request.request_id
        assert all(np.array_equal(a.completion_ids, b.completion_ids)
                   for a, b in zip(stored.trajectories, group.trajectories, strict=True))  # fmt: skip
    assert not pool.references.places.keys() & {group.request.request_id for group in groups}


def test_a_worker_with_stale_weights_is_replaced_and_its_samples_are_not_used(
    pool, config, checkpoint, requests_of, ray_session
):
    learner = LocalLearner(config, checkpoint)
    tensors = learner.publish_weights()
    learner.close()
    manifest = replace(tensors.manifest, policy_version=7)
    pool.load_weights(Publication(manifest, (ray_session.put(tensors.tensors),)))
    ray_session.get(
        pool._workers[0].handle.load_weights.remote(Publication(tensors.manifest, (ray_session.put(tensors.tensors),)))
    )
    groups = list(pool.sample(requests_of(4, 2), config.rollout.sampling))
    assert {t.policy_version for group in groups for t in group.trajectories} == {7}
    assert pool.take_restarts() >= 1
