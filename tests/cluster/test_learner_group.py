import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from unirl.cluster.learner_group import LearnerGroup
from unirl.cluster.placement import place
from unirl.cluster.rollout_pool import RolloutPool
from unirl.models.named_arrays import checksum


@pytest.fixture
def learner(ray_session, config, checkpoint):
    placement = place(config)
    group = LearnerGroup(config, checkpoint, placement)
    yield group
    group.close()
    placement.release()


def test_published_weights_are_the_checkpoint_and_workers_take_them_over(
    learner, config, checkpoint, requests_of, ray_session
):
    publication = learner.publish_weights()
    named = dict(publication.tensors())
    stored = load_file(checkpoint / "model.safetensors")
    assert publication.policy_version == 0
    assert publication.manifest.checksum == checksum(publication.tensors())
    assert all(np.array_equal(named[name], stored[name].astype(np.float32)) for name in named if stored[name].ndim)
    pool = RolloutPool(config, checkpoint, None)
    pool.load_weights(publication)
    groups = list(pool.sample(requests_of(1, 1), config.rollout.sampling))
    assert {t.policy_version for g in groups for t in g.trajectories} == {0}
    pool.close()


def test_a_replaced_worker_starts_with_the_published_weights(learner, config, checkpoint, requests_of, kill_actor):
    publication = learner.publish_weights()
    one = replace(config.rollout, both=replace(config.rollout.both, num_workers=1))
    pool = RolloutPool(replace(config, rollout=one), checkpoint, None)
    pool.load_weights(publication)
    kill_actor(pool._workers[0].handle)
    groups = list(pool.sample(requests_of(1, 1), config.rollout.sampling))
    assert {t.policy_version for g in groups for t in g.trajectories} == {0}
    pool.close()


def test_a_dead_rank_ends_the_gang_with_one_error(learner, ray_session):
    pid = ray_session.get(learner._gang._ranks[0].__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"(?s)expected every rank to finish publish; got a dead one.*--resume"):
        learner.publish_weights()
