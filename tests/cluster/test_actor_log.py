import json
import time

import pytest

from unirl.cluster.actor_log import HEARTBEAT_S, LOG_DIR, open_heartbeat, report_actor


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """The logs folder of a run, of which this process is told as actors are."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv(LOG_DIR, str(folder))
    return folder


def test_an_actor_writes_beside_its_log(logs, monkeypatch):
    monkeypatch.setenv(HEARTBEAT_S, "0.01")
    file = logs.parent / "actors" / "reward-accuracy-1.jsonl"
    with open_heartbeat("reward-accuracy-1", "reward.accuracy"):
        deadline = time.monotonic() + 10
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    line = json.loads(file.read_text().splitlines()[-1])
    assert (line["actor"], line["role"]) == ("reward-accuracy-1", "reward.accuracy")


@pytest.mark.parametrize("case", ["none wanted", "no run directory here"])
def test_where_nobody_reads_nothing_is_written(logs, monkeypatch, case):
    monkeypatch.setenv(HEARTBEAT_S, "0" if case == "none wanted" else "0.01")
    if case == "no run directory here":
        logs.rmdir()
    with open_heartbeat("pairing", "pairing") as beat, beat.at("sampling"):
        time.sleep(0.05)
    assert not (logs.parent / "actors").exists()


def test_what_became_of_an_actor_is_an_event():
    events = []
    report_actor(lambda *event: events.append(event), "learner-1", "learner", "restart", "it hung")
    report_actor(None, "learner-1", "learner", "down")
    (event,) = events
    assert event == (
        "actor",
        "learner-1 was started anew: it hung",
        {"actor": "learner-1", "role": "learner", "state": "restart"},
    )
