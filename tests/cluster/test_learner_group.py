from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from unirl.cluster.learner_group import LearnerGroup
from unirl.cluster.placement import place
from unirl.cluster.rollout_pool import RolloutPool
from unirl.models.named_arrays import checksum


@pytest.fixture(scope="module")
def states():
    """What became of the ranks."""
    return []


@pytest.fixture(scope="module")
def learner(ray_session, config, checkpoint, states):
    placement = place(config)
    group = LearnerGroup(config, checkpoint, placement, lambda kind, message, fields: states.append(fields["state"]))
    yield group
    group.close()
    placement.release()


def test_published_weights_are_the_checkpoint(learner, checkpoint):
    publication = learner.publish_weights()
    named = dict(publication.tensors())
    stored = load_file(checkpoint / "model.safetensors")
    assert publication.policy_version == 0
    assert publication.manifest.checksum == checksum(publication.tensors())
    assert all(np.array_equal(named[name], stored[name].astype(np.float32)) for name in named if stored[name].ndim)


def test_workers_take_over_what_is_published_and_a_replaced_one_starts_with_it(
    learner, alone, checkpoint, requests_of, kill_actor
):
    publication = learner.publish_weights()
    publication = replace(publication, manifest=replace(publication.manifest, policy_version=7))
    pool = RolloutPool(alone, checkpoint, None)
    pool.load_weights(publication)
    for restarts in (0, 1):
        groups = list(pool.sample(requests_of(1, 1), alone.rollout.sampling))
        assert {t.policy_version for g in groups for t in g.trajectories} == {7}
        assert pool.take_restarts() == restarts
        kill_actor(pool._workers.all[0].handle)
    pool.close()


def test_a_dead_rank_ends_the_gang_with_one_error_and_what_it_published_lives_on(
    learner, states, ray_session, kill_actor
):
    publication = learner.publish_weights()
    kill_actor(learner._gang._ranks[0])
    with pytest.raises(RuntimeError, match=r"(?s)expected every rank to finish publish; got a dead one.*--resume"):
        learner.publish_weights()
    assert states == ["up", "down"]
    fetch = ray_session.remote(lambda own: checksum(own.tensors()))
    assert ray_session.get(fetch.remote(publication), timeout=60) == publication.manifest.checksum
