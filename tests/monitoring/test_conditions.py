"""Which alerts of a run are open: by events as RunLog writes them."""

from unirl.monitoring.conditions import Conditions


def alert(sentinel, step, *, since=None, severity="warn"):
    return {"kind": "alert", "sentinel": sentinel, "step": step, "since": since or step, "severity": severity}


def over(sentinel, step):
    return {"kind": "alert over", "sentinel": sentinel, "step": step}


def told(*events):
    return [(c.alert["sentinel"], c.since, c.num_told, c.over) for c in Conditions(events).all]


def test_a_condition_told_in_two_attempts_is_one_and_its_end_closes_it():
    events = [alert("far_kl", 1), {"kind": "resume", "attempt": 1}, alert("far_kl", 2, since=1), over("far_kl", 5)]
    found = Conditions(events)
    assert (found.num_open, found.num) == (0, 1)
    assert told(*events) == [("far_kl", 1, 2, 5)]
    assert told(*events, alert("far_kl", 9)) == [("far_kl", 9, 1, None), ("far_kl", 1, 2, 5)]


def test_what_ends_the_run_leads_then_what_says_that_learning_has_gone_wrong():
    events = [alert("learning_rate_zero", 4), alert("constant_reward", 4), alert("entropy_collapse", 4)]
    events.append(alert("equal_images", 7, severity="stop"))
    names = [c.alert["sentinel"] for c in Conditions(events).all]
    assert names[0] == "equal_images"
    assert [name for name in names if name in ("constant_reward", "entropy_collapse")] == [
        "constant_reward", "entropy_collapse"
    ]  # fmt: skip
    assert all(c.is_open for c in Conditions([*events, {"kind": "end", "status": "failed"}]).all)


def test_what_a_resume_undid_is_over_unless_it_is_told_again():
    undone = [{"kind": "checkpoint", "step": 4}, alert("far_kl", 6), alert("equal_images", 3), {"kind": "resume"}]
    saved = {"kind": "checkpoint", "step": 8}
    assert told(*undone, saved) == [("equal_images", 3, 1, None), ("far_kl", 6, 1, 8)]
    assert told(*undone, alert("far_kl", 6), saved)[0] == ("far_kl", 6, 2, None)
    assert told(*undone, {"kind": "checkpoint", "step": 6})[0] == ("far_kl", 6, 1, None), "step 6 may be under way"


def test_a_sentinel_that_fails_closes_nothing_that_it_watches():
    failed = {"message": "sentinel far_kl failed: ZeroDivisionError: division by zero"}
    no_more = {"message": "sentinel far_kl failed no more; it began at step 5"}
    events = [alert("far_kl", 3), alert("far_kl", 5) | failed, over("far_kl", 8) | no_more]
    assert told(*events) == [("far_kl", 3, 1, None), ("far_kl", 5, 1, 8)]


def test_alerts_without_a_sentinel_are_each_their_own():
    found = Conditions([{"kind": "alert", "message": "a"}, {"kind": "alert", "sentinel": {}, "message": "b"}])
    assert [c.alert["message"] for c in found.all] == ["a", "b"]
