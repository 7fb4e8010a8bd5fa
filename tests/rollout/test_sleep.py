"""The engine of a worker that shares its GPU sleeps while the learner works.

Without a GPU the calls are made all the same, and free nothing.
"""

import pytest

from tests.rollout.conftest import publication, sampling_with, tokens
from unirl.models.named_arrays import compare


@pytest.fixture
def calls(engine, monkeypatch):
    """What the engine is told, in order; it does it too."""
    calls = []
    sleep, wake_up = engine._engine.llm.sleep, engine._engine.llm.wake_up

    def note_sleep(**arguments):
        calls.append(f"sleep {arguments['level']}")
        sleep(**arguments)

    def note_wake_up(**arguments):
        calls.append(f"wake {' '.join(arguments['tags'])}")
        return wake_up(**arguments)

    monkeypatch.setattr(engine._engine.llm, "sleep", note_sleep)
    monkeypatch.setattr(engine._engine.llm, "wake_up", note_wake_up)
    return calls


def test_a_rested_engine_wakes_for_weights_then_for_requests_and_draws_the_same(engine, plain, lab_requests, calls):
    requests = lab_requests(2, 2)
    before = tokens(engine.sample(requests, sampling_with()))
    asleep = engine._engine.llm.llm_engine.is_sleeping
    assert engine.weight_slices()
    engine.rest()
    assert asleep()
    assert engine.weight_slices() is None, "there is nothing to look at"
    assert tokens(engine.sample(requests, sampling_with())) == before
    assert not asleep()
    engine.rest()
    engine.rest()
    manifest, named = publication(plain.policy, plain.policy.module.state_dict(), 0)
    engine.load_weights(manifest, named)
    assert not compare(manifest, engine.weight_slices()).is_stale
    assert asleep(), "its cache is still given back"
    assert tokens(engine.sample(requests, sampling_with())) == before
    assert calls == [
        "sleep 1", "wake weights kv_cache",
        "sleep 1", "wake weights", "wake kv_cache",
    ]  # fmt: skip


def test_weights_that_only_passed_through_leave_an_engine_that_can_rest_again(engine, plain, lab_requests, calls):
    engine.rest()
    engine.load_weights(*publication(plain.policy, plain.policy.module.state_dict(), 0))
    engine.rest()
    engine.sample(lab_requests(1, 1), sampling_with())
    assert calls == ["sleep 1", "wake weights", "wake kv_cache", "sleep 1", "wake weights kv_cache"]
