import pytest

from unirl.monitoring.step_clock import StepClock


def test_seconds_add_up_by_phase_until_they_are_taken():
    times = iter([0.0, 2.0, 10.0, 11.5, 20.0, 23.0, 30.0, 30.5])
    clock = StepClock(now=lambda: next(times))
    for name in ("rollout", "update", "rollout"):
        with clock.phase(name):
            assert clock.current == name
    assert clock.take_seconds() == {"rollout": 5.0, "update": 1.5}
    with clock.phase("publish"):
        pass
    assert clock.take_seconds() == {"publish": 0.5}


def test_a_phase_that_fails_is_timed_too():
    clock = StepClock()
    with pytest.raises(ZeroDivisionError), clock.phase("update"):
        _ = 1 / 0
    assert clock.take_seconds().keys() == {"update"}
    assert clock.current == "update"
