"""A pairing service whose process dies goes on where its ledger ends: no step twice, none lost."""

import json

import pytest

from unirl.cluster.pairing_service import PairingService
from unirl.data.pair_source import PairSource, StepResult
from unirl.jobs.assets import resolve_pairs
from unirl.types import TASKS

SETTINGS = {"pairs_per_step": 4, "seed": 3, "shuffle": True, "max_pairs": 20}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return resolve_pairs("lab:pairs", tmp_path_factory.getbasetemp().parent / "cache")


@pytest.fixture
def losses():
    return []


@pytest.fixture
def service(ray_session, pairs, tmp_path, losses):
    ledger = tmp_path / "pairing.jsonl"
    ledger.write_text("of another run\n")
    made = PairingService(pairs, SETTINGS, ledger, lambda kind, message, fields: losses.append((kind, fields)))
    yield made
    made.close()


def ids(batch):
    return [pair.pair_id for pair in batch]


def results(batch, reward):
    earned = {"mean_reward": reward, "zero_variance": False}
    return [StepResult(pair_id=pair.pair_id, task=task, **earned) for pair in batch for task in TASKS]


def test_a_service_that_answers_is_up(service, losses):
    service.tell_up()
    assert losses == [("actor", {"actor": "pairing", "role": "pairing", "state": "up"})]


def test_a_killed_service_goes_on_with_leases_and_ledger(service, pairs, losses, kill_actor, tmp_path):
    plain = PairSource.open(pairs, **SETTINGS)
    for step in range(3):
        batch = service.lease(step)
        assert ids(batch) == ids(plain.lease(step))
        if step == 1:
            kill_actor(service._actor)  # with a lease out
        service.record(step, results(batch, step / 4))
        plain.record(step, results(batch, step / 4))
    service.lease(3)
    kill_actor(service._actor)
    service.lease(4)  # another lease after the loss, the older one still out
    service.record(3, results(plain.lease(3), 1.0))
    plain.record(3, results(plain.batch(3), 1.0))
    assert service.state() == plain.state()
    assert [kind for kind, _ in losses] == ["restart", "actor"] * 2
    assert losses[-1][1] == {"actor": "pairing", "role": "pairing", "state": "restart"}
    assert len((tmp_path / "pairing.jsonl").read_text().splitlines()) == 4
    with pytest.raises(RuntimeError, match="finished"):
        service.lease(3)


def test_a_record_that_was_written_before_the_loss_is_not_written_again(service, pairs, kill_actor, tmp_path):
    batch = service.lease(0)
    # The process died after it wrote the ledger and before it answered.
    line = {"step": 0, "results": [{"pair_id": r.pair_id, "task": r.task, "mean_reward": 0.5, "zero_variance": False}
                                   for r in results(batch, 0.5)]}  # fmt: skip
    (tmp_path / "pairing.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 1, "resu')
    kill_actor(service._actor)
    service.record(0, results(batch, 0.5))
    plain = PairSource.open(pairs, **SETTINGS)
    plain.record(0, results(plain.lease(0), 0.5))
    assert service.state() == plain.state()


def test_a_restored_state_begins_the_ledger_anew(service, pairs, kill_actor):
    plain = PairSource.open(pairs, **SETTINGS)
    for step in range(2):
        batch = service.lease(step)
        service.record(step, results(batch, 0.25))
        if step == 0:
            plain.record(0, results(plain.lease(0), 0.25))
    service.restore(plain.state())
    kill_actor(service._actor)
    assert service.state() == plain.state()
    assert ids(service.lease(1)) == ids(plain.batch(1))


def test_without_a_ledger_a_loss_ends_the_run(ray_session, pairs, kill_actor):
    service = PairingService(pairs, SETTINGS)
    service.lease(0)
    kill_actor(service._actor)
    with pytest.raises(RuntimeError, match="expected an answer to state"):
        service.state()
