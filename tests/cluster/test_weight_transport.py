"""The ways of weights from rank 0 to the workers, between real processes."""

import time
from dataclasses import replace

import numpy as np
import pytest

from unirl.cluster.learner_group import LearnerGroup
from unirl.cluster.placement import place
from unirl.cluster.rollout_pool import RolloutPool
from unirl.cluster.weight_broadcast import WeightBroadcast
from unirl.cluster.weight_transport import fill, parts_of, size_of, views
from unirl.config_rules import find_problems
from unirl.models.named_arrays import checksum
from unirl.monitoring.control import ScaleControl
from unirl.types import TensorSpec, WeightsManifest

WAYS = ("object_store", "broadcast", "shared_memory")


def with_transport(config, way, timeout_s=30.0):
    cluster = replace(config.cluster, weight_transport=way, broadcast_timeout_s=timeout_s)
    return replace(config, cluster=cluster)


@pytest.fixture(scope="module")
def learner(ray_session, config, checkpoint):
    """One rank, which is told before each test by which way it publishes."""
    placement = place(config)
    group = LearnerGroup(config, checkpoint, placement)
    yield group
    group.close()
    placement.release()


@pytest.fixture(scope="module")
def pool(ray_session, config, checkpoint, tmp_path_factory):
    """Two workers, and the events that they leave."""
    events = []
    control = ScaleControl(tmp_path_factory.mktemp("run"), lambda *event: events.append(event))
    pool = RolloutPool(config, checkpoint, None, control=control)
    pool.events = events
    yield pool
    pool.close()


@pytest.fixture
def by(learner, pool, config, ray_session):
    """Sets the way for both sides."""

    def by(way, timeout_s=30.0):
        pool._broadcast = WeightBroadcast(with_transport(config, way, timeout_s)) if way == "broadcast" else None
        rank = learner._gang._ranks[0]
        ray_session.get(rank.__ray_call__.remote(lambda self: setattr(self, "_transport", way)))
        pool.events.clear()

    return by


def tokens_of(groups):
    return {g.request.request_id: [t.completion_ids.tolist() for t in g.trajectories] for g in groups}


def versions_of(groups):
    return {t.policy_version for group in groups for t in group.trajectories}


def renamed(publication, version):
    """The same weights under another version; rank 0 keeps them under their own."""
    return replace(publication, manifest=replace(publication.manifest, policy_version=version))


@pytest.fixture(scope="module")
def wanted(pool, learner, config, requests_of):
    """Tokens of the published weights, as they came through the object store."""
    pool.load_weights(learner.publish_weights())
    return tokens_of(pool.sample(requests_of(4, 2), config.rollout.sampling))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_the_same_weights(by, pool, learner, config, requests_of, wanted, way):
    by(way)
    publication = learner.publish_weights()
    assert (publication.source is None, publication.shared is None, publication.buckets == ()) == {
        "object_store": (True, True, False), "broadcast": (False, True, True), "shared_memory": (False, False, True),
    }[way]  # fmt: skip
    pool.load_weights(renamed(publication, 100 + WAYS.index(way)))
    groups = list(pool.sample(requests_of(4, 2), config.rollout.sampling))
    assert versions_of(groups) == {100 + WAYS.index(way)}
    assert tokens_of(groups) == wanted
    assert pool.events == []
    assert pool.take_restarts() == 0


def test_a_second_broadcast_goes_through_the_group_that_is_there(by, pool, learner, ray_session):
    by("broadcast")
    pool.load_weights(renamed(learner.publish_weights(), 110))
    key = pool._broadcast._key
    pool.load_weights(renamed(learner.publish_weights(), 111))
    assert pool._broadcast._key == key
    members = [
        ray_session.get(worker.handle.__ray_call__.remote(lambda self: self._group.membership))
        for worker in pool._workers.all
    ]
    assert [(member.key, member.rank, member.size) for member in members] == [(key, 1, 3), (key, 2, 3)]
    assert pool.events == []


def test_a_member_that_was_killed_is_replaced_and_the_others_get_their_weights(
    by, pool, learner, config, requests_of, wanted, kill_actor
):
    """The group breaks; who lacks the weights fetches them through the object store."""
    by("broadcast", timeout_s=5.0)
    pool.load_weights(renamed(learner.publish_weights(), 120))
    kill_actor(pool._workers.all[0].handle)
    publication = learner.publish_weights()
    started = time.monotonic()
    pool.load_weights(publication)
    assert time.monotonic() - started < 60
    ((kind, message, _),) = pool.events
    assert kind == "weights"
    assert "were not broadcast to all" in message
    groups = list(pool.sample(requests_of(4, 2), config.rollout.sampling))
    assert tokens_of(groups) == wanted
    assert versions_of(groups) == {publication.policy_version}
    assert pool.take_restarts() == 1


def test_a_worker_that_joins_fetches_the_weights_and_is_in_the_next_broadcast(
    by, pool, learner, config, requests_of, wanted
):
    by("broadcast")
    publication = learner.publish_weights()
    pool.load_weights(publication)
    pool.scale({"both": 3})
    while pool._workers.num_up()["both"] < 3:
        assert tokens_of(pool.sample(requests_of(4, 2), config.rollout.sampling)) == wanted
    assert {worker.sent for worker in pool._workers.all} == {publication.identity}
    pool.load_weights(renamed(learner.publish_weights(), 130))
    assert len(pool._broadcast._members) == 4
    groups = list(pool.sample(requests_of(4, 2), config.rollout.sampling))
    assert (versions_of(groups), tokens_of(groups)) == ({130}, wanted)
    assert pool.events == []
    pool.scale({"both": 2})
    list(pool.sample(requests_of(1, 1), config.rollout.sampling))


def test_shared_memory_is_read_in_place_and_told_from_what_its_place_holds_later(by, learner, ray_session):
    by("shared_memory")
    first = learner.publish_weights()

    def look(own):
        named = own.shared.named(own.manifest)
        return checksum(named), named[0][1].flags.writeable

    read = ray_session.remote(look)
    assert ray_session.get(read.remote(first)) == (first.manifest.checksum, False)
    later = [learner.publish_weights() for _ in range(3)]
    assert first.shared.descriptor in {own.shared.descriptor for own in later}, "the number was used again"
    assert first.shared.named(first.manifest) is None
    elsewhere = replace(later[-1].shared, node_id="another machine")
    assert elsewhere.named(later[-1].manifest) is None
    fetched = replace(later[-1], shared=elsewhere)
    assert checksum(fetched.tensors()) == fetched.manifest.checksum, "who cannot see it fetches it"


def test_weights_that_rank_0_has_no_longer_are_refused_by_name(by, learner, ray_session):
    by("broadcast")
    old = renamed(learner.publish_weights(), 99)
    with pytest.raises(LookupError, match=r"expected those of version 99; got 0; ask for the newest ones"):
        list(old.tensors())


def test_parts_hold_every_tensor_once_in_its_place():
    generator = np.random.default_rng(0)
    arrays = {
        "a": generator.normal(size=(3, 5)).astype(np.float32),
        "b": generator.integers(0, 2**16, 7).astype(np.uint16),
        "c": np.array(3, np.int32),
        "d": np.zeros((0, 4), np.float32),
        "e": generator.normal(size=100),
    }
    specs = tuple(
        TensorSpec(name=n, shape=a.shape, dtype="bfloat16" if a.dtype == np.uint16 else str(a.dtype))
        for n, a in arrays.items()
    )
    manifest = WeightsManifest(policy_version=0, tensors=specs, checksum="")
    parts = list(parts_of(manifest, part_bytes=100))
    assert [spec for part in parts for spec in part] == list(specs)
    assert [[spec.name for spec in part] for part in parts] == [["a", "b", "c", "d"], ["e"]]
    for part in parts:
        buffer = np.full(size_of(part), 255, np.uint8)
        fill(buffer, part, arrays)
        for name, array in views(buffer, part):
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name])


def test_colocated_gpus_cannot_broadcast(config):
    wrong = with_transport(config, "broadcast")
    wrong = replace(
        wrong,
        cluster=replace(wrong.cluster, placement="colocated"),
        learner=replace(wrong.learner, num_gpus=0.5),
    )
    assert [problem.key for problem in find_problems(wrong)] == ["cluster.weight_transport"]
    assert find_problems(with_transport(config, "broadcast")) == []


def test_weights_that_stay_with_rank_0_are_not_fetched_while_it_learns(config):
    wrong = with_transport(config, "shared_memory")
    wrong = replace(wrong, overlap=replace(wrong.overlap, mode="bounded_staleness"))
    assert [problem.key for problem in find_problems(wrong)] == ["cluster.weight_transport"]
