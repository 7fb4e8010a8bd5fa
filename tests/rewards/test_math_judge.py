import os
import signal
import time

import pytest

from unirl.rewards import math_judge
from unirl.rewards.math_judge import CouldNotJudgeError, MathJudge

HANGS = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def judge():
    judge = MathJudge(timeout_s=10.0)
    yield judge
    judge.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_verdicts(judge):
    assert judge.judge(["(x+1)^2"], ["x^2+2x+1"]) == "equal"
    assert judge.judge(["1", "2"], ["2", "1"]) == "different"
    assert judge.judge(["1"], ["1", "1"]) == "different"
    assert judge.judge(["1"], [r"\frac{"]) == "unreadable_answer"
    assert judge.judge([r"\frac{"], ["1"]) == "unreadable_gold"


def test_one_child_serves_many_items(judge):
    assert MathJudge(timeout_s=2.0).pid is None
    judge.judge(["1"], ["1"])
    pid = judge.pid
    judge.judge(["2"], ["2"])
    assert judge.pid == pid


def test_a_hang_is_killed_within_its_limit_and_the_child_replaced():
    judge = MathJudge(timeout_s=2.0)
    judge.judge(["1"], ["1"])
    pid = judge.pid
    start = time.monotonic()
    with pytest.raises(CouldNotJudgeError, match="nothing after 2 s"):
        judge.judge(["2"], [HANGS])
    assert 2.0 <= time.monotonic() - start < 5.0
    assert not is_running(pid)
    assert judge.judge(["2"], ["2"]) == "equal"
    assert judge.pid != pid
    judge.close()


def test_a_killed_child_is_replaced(judge):
    judge.judge(["1"], ["1"])
    os.kill(judge.pid, signal.SIGKILL)
    with pytest.raises(CouldNotJudgeError):
        judge.judge(["1"], ["1"])
    assert judge.judge(["1"], ["1"]) == "equal"


def test_an_interrupt_leaves_no_late_reply_behind(judge, monkeypatch):
    judge.judge(["1"], ["1"])

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(math_judge.os, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge.judge(["1"], ["1"])
    assert judge.pid is None
    assert judge.judge(["1"], ["2"]) == "different"


def test_a_child_that_cannot_start_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(math_judge, "_CHILD", broken)
    with pytest.raises(RuntimeError, match=r"broken\.py.*status 3.*math_verify"):
        MathJudge(timeout_s=1.0).judge(["1"], ["1"])


def test_a_dropped_judge_takes_its_child_along():
    judge = MathJudge(timeout_s=2.0)
    judge.judge(["1"], ["1"])
    pid = judge.pid
    del judge
    assert not is_running(pid)
