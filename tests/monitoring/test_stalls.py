"""Waits that are too long: of the whole run, of one worker among others, of one whose heart has stopped."""

import json
import time

import pytest

from unirl.monitoring.heartbeat import Heartbeat
from unirl.monitoring.stalls import Sign, Stalls, StallWatch


def told(stalls, moments):
    return [(now, message) for now, signs in moments for message in stalls.look(signs, now)]


def driver(phase, mark):
    return Sign("driver", phase, mark)


def worker(mark, state="sampling", process=1, **facts):
    return Sign("rollout.text", state, mark, process, **facts)


def test_a_run_in_which_nothing_moves_is_told_once():
    moments = [(float(now), {"driver": driver("rollout", 0)}) for now in range(0, 100, 5)]
    assert told(Stalls(30), moments) == [(35.0, "nothing has happened for 35s; waiting for rollout")]


def test_a_wait_may_take_thrice_what_ended_well_before():
    """The second phase of 200 s is usual; one of more than 600 s is not."""
    stalls = Stalls(30)
    first = [(float(now), {"driver": driver("rollout", 0)}) for now in range(0, 200, 10)]
    assert len(told(stalls, first)) == 1, "the first time nobody can know"
    second = [(200.0 + now, {"driver": driver("rollout", 1)}) for now in range(0, 820, 10)]
    assert told(stalls, second) == [
        (200.0 + 610, "nothing has happened for 10m10s (at most 3m20s before); waiting for rollout")
    ]


def test_other_phases_have_waits_of_their_own():
    stalls = Stalls(30)
    told(stalls, [(0.0, {"driver": driver("rollout", 0)}), (200.0, {"driver": driver("update", 0)})])
    assert [now for now, _ in told(stalls, [(229.0, {"driver": driver("update", 0)})])] == []
    assert [now for now, _ in told(stalls, [(231.0, {"driver": driver("update", 0)})])] == [231.0]


def test_one_worker_that_hangs_while_others_go_on_is_named():
    moments = [
        (float(now), {"driver": driver("rollout", now), "rollout-text-0": worker(now), "rollout-text-1": worker(0)})
        for now in range(0, 100, 5)
    ]
    assert told(Stalls(30), moments) == [
        (35.0, "rollout-text-1 is sampling and has not moved for 35s (at most 5s before)")
    ]


def test_a_worker_without_work_or_that_is_gone_is_left_alone():
    idle = [
        (float(now), {"driver": driver("update", now), "w": worker(0, "idle", busy=False)}) for now in range(0, 90, 5)
    ]
    assert told(Stalls(30), idle) == []
    leaves = [(0.0, {"w": worker(0)}), (20.0, {}), (40.0, {"w": worker(0)}), (60.0, {"w": worker(0)})]
    assert told(Stalls(30), leaves) == []


def test_a_heart_that_stopped_is_told_even_of_an_idle_worker():
    moments = [(float(now), {"w": worker(0, "idle", busy=False, silent_s=now)}) for now in range(0, 90, 5)]
    assert told(Stalls(30), moments) == [(35.0, "w has written no heartbeat for 35s; it was idle")]


def test_what_was_replaced_had_not_ended_well():
    """A unit that hung until its worker was replaced makes nobody more patient."""
    stalls = Stalls(30)
    hung = [(float(now), {"w": worker(0)}) for now in range(0, 600, 10)]
    assert len(told(stalls, hung)) == 1
    again = [(600.0 + now, {"w": worker(0, process=2)}) for now in range(0, 100, 5)]
    assert [now for now, _ in told(stalls, again)] == [635.0]


def beat(folder, name, **fields):
    line = {"actor": name, "role": "rollout.text", "state": "sampling", "time": 0.0, "num_done": 0, "pid": 1} | fields
    (folder / "actors").mkdir(exist_ok=True)
    with (folder / "actors" / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def watch(tmp_path):
    beat(tmp_path, "rollout-text-7", time=1.0)
    now = [100.0]
    own = Heartbeat("driver", "driver", folder=None, every_s=0)
    own.state = "rollout"
    gone = set()
    made = StallWatch(tmp_path, own, after_s=30, on_stall=lambda _: None, gone=gone, now=lambda: now[0])
    with made:
        yield made, own, gone, now


def test_workers_are_seen_through_their_heartbeats(tmp_path, watch):
    made, own, gone, now = watch
    assert set(made.signs()) == {"driver"}, "a worker of an earlier attempt is not waited for"
    beat(tmp_path, "rollout-text-0", time=2.0)
    before = made.signs()
    assert set(before) == {"driver", "rollout-text-0"}
    now[0] += 5
    beat(tmp_path, "rollout-text-0", time=7.0)
    assert made.signs() == before, "that the heart beats is no sign"
    beat(tmp_path, "rollout-text-0", time=8.0, num_passes=3)
    moved = made.signs()
    assert moved["driver"] != before["driver"]
    assert moved["rollout-text-0"] != before["rollout-text-0"]
    now[0] += 90
    assert made.signs()["rollout-text-0"].silent_s == 90
    own.num_done += 1
    assert made.signs()["driver"] != moved["driver"]
    gone.add("rollout-text-0")
    assert set(made.signs()) == {"driver"}


def test_the_thread_says_it_while_the_run_hangs(tmp_path):
    said = []
    own = Heartbeat("driver", "driver", folder=None, every_s=0, look=lambda: "rollout")
    with StallWatch(tmp_path, own, after_s=0.1, on_stall=said.append):
        time.sleep(0.5)
    (message,) = said
    assert message.startswith("nothing has happened for ")
    assert message.endswith("waiting for rollout")


def test_passes_are_signs_of_life(tmp_path):
    said = []
    own = Heartbeat("driver", "driver", folder=None, every_s=0, look=lambda: "rollout")
    own.count_passes = lambda: time.monotonic_ns()
    with StallWatch(tmp_path, own, after_s=0.1, on_stall=said.append):
        time.sleep(0.5)
    assert said == []
