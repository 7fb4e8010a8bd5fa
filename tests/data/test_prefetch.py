import threading
import time

import pytest

from unirl.data.prefetch import Prefetch


def test_steps_come_in_order_and_ahead():
    made = []
    ahead = Prefetch(lambda step: made.append(step) or step * 10, 3, 6)
    assert [ahead.take(step) for step in range(3, 7)] == [30, 40, 50, 60]
    assert made == [3, 4, 5, 6], "nothing is made beyond the last"
    ahead.close()


def test_it_waits_only_for_what_is_not_made():
    slow = Prefetch(lambda step: time.sleep(0.1 if step == 1 else 0), 1, 2)
    with pytest.raises(AssertionError, match="gives a result"):
        slow.take(1)
    assert slow.wait_s > 0.05
    slow.close()


def test_an_error_is_raised_where_the_step_is_taken():
    def make(step):
        if step == 2:
            raise ValueError("broken")
        return step

    ahead = Prefetch(make, 1, 5)
    assert ahead.take(1) == 1
    with pytest.raises(ValueError, match="broken"):
        ahead.take(2)
    ahead.close()


def test_closing_ends_the_thread():
    before = threading.active_count()
    Prefetch(lambda step: step, 1, 10**9).close()
    assert threading.active_count() == before
