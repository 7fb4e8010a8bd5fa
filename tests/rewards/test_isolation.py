import sys
import threading
import time

import numpy as np
import pytest

from tests.rewards.groups import answers, question
from unirl.config import RewardConfig
from unirl.rewards.isolation import MAX_HUNG, IsolatedReward
from unirl.types import RewardScores

GROUP = answers(question(), ["a", "bb"])


class Scripted:
    """A reward that does what each step says: a callable is called first, an exception raised, a scores returned."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.num_calls = 0

    def score(self, group):
        self.num_calls += 1
        step = self.steps.pop(0) if self.steps else lambda: None
        if isinstance(step, BaseException):
            raise step
        result = step()
        return result or RewardScores(values=np.ones(len(group.trajectories), np.float32), judged=np.ones(2, np.bool_))


def isolated(reward, **settings):
    builds = []

    def build(name, config):
        builds.append(name)
        return reward

    return IsolatedReward("scripted", RewardConfig(**settings), build), builds


def spin():
    while True:
        pass


def spin_and_swallow():
    while True:
        try:
            spin()
        except Exception:  # noqa: BLE001
            continue


def assert_masked(scores, *words):
    assert not scores.judged.any()
    assert scores.values.shape == (2,)
    for word in words:
        assert word in scores.problem


def test_a_working_reward_passes_through_once():
    reward = Scripted()
    safe, _ = isolated(reward)
    assert safe.score(GROUP).judged.all()
    assert safe.score(GROUP).values.tolist() == [1, 1]
    assert (reward.num_calls, safe.num_failures) == (1, 0)


def test_a_passing_failure_is_retried():
    reward = Scripted(RuntimeError("busy"))
    safe, _ = isolated(reward, max_attempts=2)
    assert safe.score(GROUP).judged.all()
    assert (reward.num_calls, safe.num_failures) == (2, 0)


def test_a_lasting_failure_masks_and_never_scores_zero(caplog):
    safe, _ = isolated(Scripted(RuntimeError("no"), RuntimeError("gone")), max_attempts=2)
    assert_masked(safe.score(GROUP), "scripted", "p1/understanding", "RuntimeError: gone", "masked")
    assert safe.num_failures == 1
    assert "gone" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        SystemExit(1),
        lambda: RewardScores(values=np.array([np.nan, 1], np.float32), judged=np.ones(2, np.bool_)),
        lambda: RewardScores(values=np.ones(3, np.float32), judged=np.ones(3, np.bool_)),
        lambda: [1.0, 1.0],
    ],
)
def test_what_is_no_valid_score_counts_as_a_failure(bad):
    safe, _ = isolated(Scripted(bad), max_attempts=1)
    assert_masked(safe.score(GROUP), "scripted")


@pytest.fixture
def no_tracing():
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize("hang", [spin, spin_and_swallow])
def test_a_hang_in_python_is_ended_and_the_reward_lives_on(hang):
    reward = Scripted(hang)
    safe, builds = isolated(reward, timeout_s=0.2, max_attempts=1)
    start = time.monotonic()
    assert_masked(safe.score(GROUP), "no scores after 0.2 s")
    assert time.monotonic() - start < 3
    assert safe.num_hung == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "reward-scripted"]
    assert safe.score(GROUP).judged.all()
    assert builds == ["scripted"]


def test_a_hang_outside_python_is_abandoned_and_the_reward_built_anew():
    release = threading.Event()
    reward = Scripted(*[lambda: release.wait() and None] * MAX_HUNG)
    safe, builds = isolated(reward, timeout_s=0.05, max_attempts=1)
    for hung in range(1, MAX_HUNG + 1):
        assert_masked(safe.score(GROUP), "no scores after")
        assert safe.num_hung == hung
    assert len(builds) == MAX_HUNG
    assert_masked(safe.score(GROUP), "still hang outside Python", "restart the process")
    assert reward.num_calls == MAX_HUNG
    release.set()
    deadline = time.monotonic() + 5
    while safe.num_hung and time.monotonic() < deadline:
        time.sleep(0.01)
    assert safe.score(GROUP).judged.all()


def test_under_a_debugger_a_late_thread_is_only_abandoned():
    release = threading.Event()
    safe, _ = isolated(Scripted(lambda: release.wait() and None), timeout_s=0.05, max_attempts=1)
    tracer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        scores = safe.score(GROUP)
    finally:
        sys.settrace(tracer)
    assert_masked(scores, "no scores after")
    assert safe.num_hung == 1
    release.set()


def test_closing_ends_what_the_reward_started():
    reward = Scripted()
    safe, _ = isolated(reward)
    safe.close()
    reward.close = lambda: reward.steps.append("closed")
    safe.close()
    assert reward.steps == ["closed"]


def test_errors_of_building_are_not_swallowed():
    with pytest.raises(ValueError, match="accuracy: expected"):
        IsolatedReward("accuracy", RewardConfig(options={"answer_format": "x"}))
