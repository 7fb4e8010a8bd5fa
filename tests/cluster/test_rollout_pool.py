import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from unirl.cluster.placement import place
from unirl.cluster.rollout_pool import RolloutPool
from unirl.cluster.weight_sync import Publication
from unirl.config import ModelConfig
from unirl.jobs.local import LocalRollouts
from unirl.models.named_arrays import checksum, slice_checksum, to_array, to_tensor
from unirl.models.policy import load_policy
from unirl.monitoring.control import ScaleControl, order_scale, read_answer
from unirl.monitoring.step_data import SyncCheck
from unirl.rollout.units import units_of_work
from unirl.types import TensorSpec, WeightsManifest


@pytest.fixture(scope="module")
def events():
    """What the pool reported of its workers."""
    return []


@pytest.fixture(scope="module")
def pool(ray_session, config, checkpoint, events):
    """Two workers for all tests, since starting them takes most of the time; the last gives them other weights."""
    pool = RolloutPool(config, checkpoint, None, report=lambda kind, message, fields: events.append((kind, fields)))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """Orders by file, and the events they leave."""
    events = []
    control = ScaleControl(tmp_path_factory.mktemp("run"), lambda *event: events.append(event))
    control.events = events
    return control


@pytest.fixture(scope="module")
def one(ray_session, alone, checkpoint, control):
    """A pool of one worker that takes orders; each test leaves it with one."""
    pool = RolloutPool(alone, checkpoint, None, control=control)
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
    alone = LocalRollouts(config, checkpoint)
    pool.take_activities()
    begin = time.perf_counter()
    assert tokens_of(pool.sample(requests, config.rollout.sampling)) == tokens_of(
        alone.sample(requests, config.rollout.sampling)
    )
    ours, theirs = pool.take_activities(), alone.take_activities()
    for name in ("num_requests", "num_tokens", "num_images"):
        assert sorted(getattr(a, name) for a in ours) == sorted(getattr(a, name) for a in theirs), name
    for activity in ours:
        assert begin < activity.begin < activity.busy_until <= activity.end < time.perf_counter()
        assert sum(activity.seconds.values()) < activity.end - activity.begin, "the worker's time lies in the driver's"
        assert activity.seconds["decode"] > 0
    assert {phase for a in ours for phase, s in a.seconds.items() if s > 0.001} >= {"text_rollout", "image_rollout"}
    assert pool.take_activities() == []


def test_killed_workers_are_replaced_and_every_request_is_answered_once(pool, config, requests_of, kill_actor, events):
    requests = requests_of(8, 2)
    stream = pool.sample(requests, config.rollout.sampling)
    groups = [next(stream)]
    for worker in list(pool._workers.all):
        kill_actor(worker.handle)
    groups += stream
    assert sorted(g.request.request_id for g in groups) == sorted(r.request_id for r in requests)
    assert (pool.take_restarts(), pool.take_restarts()) == (2, 0)
    told = [(fields["actor"], fields["state"]) for kind, fields in events if kind == "actor"]
    assert sorted(actor for actor, state in told if state == "restart") == ["rollout-both-0", "rollout-both-1"]
    # Those in their place are up when they take work.
    assert "up" in {state for _, state in told}
    assert tokens_of(groups) == tokens_of(pool.sample(requests, config.rollout.sampling))


def test_a_hung_worker_is_found_by_its_deadline_and_replaced(one, config, requests_of, monkeypatch):
    requests = requests_of(1, 1)
    wanted = tokens_of(one.sample(requests, config.rollout.sampling))
    patience = replace(one._config, rollout=replace(one._config.rollout, timeout_s=5.0))
    monkeypatch.setattr(one, "_config", patience)
    one._workers.all[0].handle.__ray_call__.remote(lambda self: time.sleep(600))
    started = time.monotonic()
    assert tokens_of(one.sample(requests, config.rollout.sampling)) == wanted
    assert time.monotonic() - started < 120
    assert one.take_restarts() == 1
    assert one.take_quarantined() == []


def poisoned(request):
    """The request with seeds that no generator takes, which ends its whole unit with an error."""
    return replace(request, seeds=tuple(f"poison {seed}" for seed in request.seeds))


def test_a_poison_request_is_named_after_its_tries_and_the_others_are_answered(one, config, requests_of):
    """Units of four completions hold two requests each: the poison takes its company along until both are alone."""
    requests = requests_of(2, 2)
    requests[1] = poisoned(requests[1])
    answered = {g.request.request_id for g in one.sample(requests, config.rollout.sampling)}
    (quarantined,) = one.take_quarantined()
    assert answered == {r.request_id for r in requests} - {requests[1].request_id}
    assert (quarantined.request_id, quarantined.task) == (requests[1].request_id, requests[1].task)
    assert (quarantined.num_completions, quarantined.attempts) == (2, config.rollout.max_attempts)
    assert "got str" in quarantined.error
    assert one.take_restarts() > 0, "a worker that fails twice in a row may be the one at fault"
    assert one.take_quarantined() == []


def test_when_everything_fails_the_run_is_stopped_with_the_last_error(one, config, requests_of, monkeypatch):
    monkeypatch.setattr("unirl.cluster.rollout_pool.MAX_FAILURES_IN_A_ROW", 100)
    with pytest.raises(
        RuntimeError, match=r"expected answers; got none, and 2 requests that failed;.*3 times;.*got str"
    ):
        list(one.sample([poisoned(request) for request in requests_of(1, 1)], config.rollout.sampling))
    assert one.take_restarts() == 0
    assert len(one.take_quarantined()) == 2


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


@pytest.fixture(scope="module")
def published(ray_session, checkpoint):
    """Makes a publication of the checkpoint's weights under a version, or of those times a factor."""
    state = load_policy(ModelConfig(), checkpoint).module.state_dict()
    shapes = load_policy(ModelConfig(), checkpoint).shapes

    @cache
    def weights(factor):
        named = [(name, to_array(value * factor)) for name, value in state.items() if name in shapes]
        specs = tuple(TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype)) for name, array in named)
        slices = tuple(slice_checksum(to_tensor(array)) for _, array in named)
        return {"tensors": specs, "checksum": checksum(named), "slices": slices}, ray_session.put(named)

    def publish(version, factor=1):
        manifest, bucket = weights(factor)
        return Publication(WeightsManifest(policy_version=version, **manifest), (bucket,))

    return publish


def versions_of(groups):
    return {t.policy_version for group in groups for t in group.trajectories}


def test_a_worker_with_stale_weights_is_replaced_and_its_samples_are_not_used(
    pool, config, requests_of, ray_session, published
):
    pool.load_weights(published(7))
    ray_session.get(pool._workers.all[0].handle.load_weights.remote(published(0)))
    groups = list(pool.sample(requests_of(4, 2), config.rollout.sampling))
    assert versions_of(groups) == {7}
    assert pool.take_restarts() >= 1


def test_a_worker_that_keeps_its_old_weights_is_named(pool, config, requests_of, ray_session, published):
    """It says that it has the new ones."""

    def deafen(worker):
        kind = type(worker._sampler)
        worker.kept = kind.load_weights
        kind.load_weights = lambda self, manifest, tensors: setattr(self, "policy_version", manifest.policy_version)

    def heal(worker):
        type(worker._sampler).load_weights = worker.kept

    def blind(worker):
        def fail(self):
            raise RuntimeError("no memory left to read weights")

        worker.slices = type(worker._sampler).weight_slices
        type(worker._sampler).weight_slices = fail

    def show(slices):
        def change(worker):
            type(worker._sampler).weight_slices = lambda self: slices

        return change

    def see(worker):
        type(worker._sampler).weight_slices = worker.slices

    def after(publication, **settings):
        pool.load_weights(publication, **settings)
        list(pool.sample(requests_of(2, 2), config.rollout.sampling))
        ray_session.get([worker.handle.ready.remote() for worker in pool._workers.all])
        return pool.take_sync_check()

    def stale_after(publication, **settings):
        return list(after(publication, **settings).stale)

    assert after(published(20)) == SyncCheck((), len(published(20).manifest.tensors))
    deaf = pool._workers.all[0]
    ray_session.get(deaf.handle.__ray_call__.remote(deafen))
    assert stale_after(published(21, factor=2)) == [deaf.name]
    assert stale_after(published(22, factor=3), wait=False) == [deaf.name]
    ray_session.get(deaf.handle.__ray_call__.remote(heal))
    assert stale_after(published(23)) == []
    ray_session.get(deaf.handle.__ray_call__.remote(blind))
    assert stale_after(published(24)) == [deaf.name], "weights that cannot be compared are not taken for the same"
    ray_session.get(deaf.handle.__ray_call__.remote(show({})))
    assert after(published(25)) == SyncCheck((deaf.name,), 0)
    ray_session.get(deaf.handle.__ray_call__.remote(show(None)))
    assert stale_after(published(26)) == [], "a worker that rests is not accused"
    ray_session.get(deaf.handle.__ray_call__.remote(see))
    assert stale_after(published(27)) == []
    assert pool.take_restarts() == 0


def test_weights_published_while_the_pool_samples_reach_each_worker_with_its_next_unit(
    pool, config, requests_of, published
):
    """Units under way keep their weights, which the driver allows; units after them have the new ones."""
    pool.load_weights(published(8))
    pool.oldest_version = 8
    stream = pool.sample(requests_of(8, 2), config.rollout.sampling)
    groups = [next(stream)]
    pool.load_weights(published(9), wait=False)
    groups += stream
    assert versions_of(groups) == {8, 9}
    pool.oldest_version = 10
    pool.load_weights(published(10), wait=False)
    again = list(pool.sample(requests_of(8, 2), config.rollout.sampling))
    assert versions_of(again) == {10}
    assert tokens_of(again) == tokens_of(groups), "the weights were the same under every name"
    pool.oldest_version = None
    assert pool.take_restarts() == 0


def test_groups_older_than_the_driver_allows_are_sampled_again(pool, config, requests_of, published):
    """A unit holds one request here."""
    pool.load_weights(published(11))
    pool.oldest_version = 11
    stream = pool.sample(requests_of(4, 4), config.rollout.sampling)
    first = next(stream)
    pool.load_weights(published(12), wait=False)
    pool.oldest_version = 12
    rest = list(stream)
    pool.oldest_version = None
    assert versions_of([first]) == {11}
    assert versions_of(rest) == {12}
    assert len(rest) == 7
    assert pool.take_restarts() == 0, "nobody was at fault"


@pytest.mark.slow
def test_with_in_flight_updates_a_unit_goes_on_under_weights_that_come_while_it_runs(
    ray_session, alone, checkpoint, requests_of, published
):
    """One thread samples long units; publications of equal weights come until a completion holds two versions."""
    config = replace(alone, rollout=replace(alone.rollout, sequences_per_unit=64))
    requests, sampling = requests_of(8, 8), config.rollout.sampling
    pool = RolloutPool(config, checkpoint, None, in_flight_updates=True)
    pool.load_weights(published(0))
    pool.oldest_version = 0
    wanted, versions, spans = tokens_of(pool.sample(requests, sampling)), itertools.count(1), set()
    with ThreadPoolExecutor(1) as thread:
        for _ in range(50):
            sampling_now = thread.submit(lambda: list(pool.sample(requests, sampling)))
            while not sampling_now.done():
                pool.load_weights(published(next(versions)), wait=False)
                time.sleep(0.05)
            assert tokens_of(sampling_now.result()) == wanted
            spans |= {t.version_spans for group in sampling_now.result() for t in group.trajectories} - {()}
            if spans:
                break
    assert spans
    assert all(own[0][0] == 0 and own[0][1] < own[1][1] for own in spans)
    pool.close()


def obey(pool, control, counts, requests, sampling):
    """Order the counts and sample until the last word on it is spoken; returns it, and every step's tokens."""
    order, steps = order_scale(control._run_dir, counts), []
    while (answer := read_answer(control._run_dir, order)) is None or answer["state"] == "joining":
        steps.append(tokens_of(pool.sample(requests, sampling)))
        time.sleep(0.5)
    return answer, steps


def test_workers_join_and_leave_a_live_pool_and_change_no_token(one, control, config, requests_of):
    requests, sampling = requests_of(6, 2), config.rollout.sampling
    wanted = tokens_of(one.sample(requests, sampling))
    joined, growing = obey(one, control, {"both": 3}, requests, sampling)
    assert (joined["state"], joined["workers"]) == ("joined", {"both": 3})
    assert len(growing) > 1, "sampling went on while they started"
    stream = one.sample(requests, sampling)
    first = next(stream)
    assert {name for name, *_ in (w.name.split() for w in one._workers.all)} == {"rollout.both"}
    fewer = order_scale(control._run_dir, {"both": 1})
    rest = tokens_of([first, *stream])
    left, shrinking = obey(one, control, {"both": 1}, requests, sampling)
    assert read_answer(control._run_dir, fewer) is None, "the second order took the place of the first"
    assert (left["state"], left["workers"]) == ("joined", {"both": 1})
    assert all(tokens == wanted for tokens in [*growing, rest, *shrinking])
    assert [message for _, message, _ in control.events][:3] == [
        "rollout.both 1 -> 3",
        "rollout.both 3",
        "rollout.both 3 -> 1",
    ]
    assert one.take_restarts() == 0


@pytest.mark.slow
def test_a_worker_that_does_not_come_up_is_done_without(one, control, config, requests_of, checkpoint, tmp_path):
    one._workers.checkpoint = tmp_path / "gone"
    requests, sampling = requests_of(1, 1), config.rollout.sampling
    answer, steps = obey(one, control, {"both": 2}, requests, sampling)
    one._workers.checkpoint = checkpoint
    assert answer["state"] == "refused"
    assert re.search(r"rollout\.both \d did not start: FileNotFoundError", answer["message"])
    assert answer["workers"] == {"both": 1}
    assert steps[0] == steps[-1]
    assert one.take_restarts() == 0


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"video": 2}, r"expected counts of text, image, both, 0 or more; got \['video'\]"),
        ({"both": -1}, "0 or more"),
        (
            {"both": 0},
            r"expected a worker for each task that is sampled; got none for \['generation', 'understanding'\]",
        ),
        ({"both": 0, "text": 1}, r"got none for \['generation'\]"),
        ({"both": 100}, r"expected 49.5 free CPUs for 99 more workers; got .*cluster.num_cpus"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(one, counts, words):
    before = [worker.name for worker in one._workers.all]
    with pytest.raises(ValueError, match=words):
        one.scale(counts)
    assert [worker.name for worker in one._workers.all] == before


def test_colocated_workers_are_not_scaled(ray_session, alone, checkpoint):
    config = replace(alone, cluster=replace(alone.cluster, placement="colocated"))
    placement = place(config)
    pool = RolloutPool(config, checkpoint, placement)
    with pytest.raises(ValueError, match=r"cluster\.placement=colocated, where they share the learner's"):
        pool.scale({"both": 2})
    pool.close()
    placement.release()
