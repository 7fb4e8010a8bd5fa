import time

import pytest

from tests.dashboard.conftest import add_lines, ask
from tests.monitoring.made_run import make_config
from unirl.monitoring.run_log import RunLog


def beat(at, actor="rollout-text-0", role="rollout.text", **changes):
    fixed = {"v": 1, "time": at, "actor": actor, "role": role, "state": "sampling", "queue": 2, "policy_version": 7}
    counted = {"num_done": 1, "num_tokens": 0, "num_images": 0, "memory_mb": 800.0, "pid": 1, "node": "n0"}
    return fixed | counted | changes


@pytest.fixture
def live(tmp_path):
    config = make_config(50)
    with RunLog(tmp_path / "live", config, config.monitoring) as log:
        (tmp_path / "live" / "actors").mkdir()
        yield log


def actors_of(log, **query):
    found = ask(log.run_dir.parent).get("/api/run/live/fleet", params=query).json()["actors"]
    return {actor["actor"]: actor for actor in found}


def strip_of(log):
    return ask(log.run_dir.parent).get("/api/run/live/strip").json()["strip"]


def test_workers_that_fell_silent_are_down_and_lags_are_counted(live):
    now, folder = time.time(), live.run_dir / "actors"
    said = ((now - 5, 8), (now - 2, 9), (now, 10))
    add_lines(folder / "driver.jsonl", *(beat(at, "driver", "driver", policy_version=n) for at, n in said))
    add_lines(folder / "rollout-text-0.jsonl", beat(now - 1))
    add_lines(folder / "rollout-image-0.jsonl", beat(now - 60, "rollout-image-0", "rollout.image", policy_version=3))
    add_lines(folder / "reward-x.jsonl", beat(now - 2, "reward-x", "reward.accuracy", policy_version=None))
    strip = strip_of(live)
    assert strip["workers"] == {
        "driver": [1, 1],
        "learner": [0, 1],
        "rollout.text": [1, 1],
        "rollout.image": [0, 1],
        "reward.accuracy": [1, 1],
        "reward.lab_verifier": [0, 1],
    }
    assert strip["version"] == 10
    assert strip["lag"] == {"max": 2, "by_actor": {"rollout-text-0": 2}}, "9 was held when it spoke, 10 only later"
    live.event("scale", "four workers", {"state": "done", "workers": {"rollout.text": 4}})
    assert strip_of(live)["workers"]["rollout.text"] == [1, 4]


def test_a_run_without_heartbeats_names_no_workers(live):
    assert strip_of(live)["workers"] == {}
    assert actors_of(live) == {}


def test_speed_states_and_restarts_come_from_the_beats(live):
    began = time.time() - 100
    beats = [
        beat(began + 5 * n, num_tokens=1000 * n, num_done=n, state="idle" if n % 2 else "sampling") for n in range(11)
    ]
    more = [beat(began + 60 + 5 * n, num_tokens=100 * n, num_images=10 * n, pid=2) for n in range(5)]
    add_lines(live.run_dir / "actors/rollout-text-0.jsonl", *beats, *more)
    (actor,) = actors_of(live).values()
    assert (actor["role"], actor["state"], actor["queue"], actor["policy_version"]) == (
        "rollout.text",
        "sampling",
        2,
        7,
    )
    assert actor["restarts"] == 1
    assert actor["age_s"] == pytest.approx(20, abs=5)
    assert len(actor["history"]) == 16
    at, state, version, rate = actor["history"][3]
    assert (at, state, version, rate) == (pytest.approx(began + 15, abs=0.1), "idle", 7, 200.0)
    assert actor["history"][0][3] is None
    assert actor["history"][11][3] is None, "the count began anew"
    (later,) = actors_of(live, since=began + 71).values()
    assert [round(point[0] - began) for point in later["history"]] == [75, 80]


def test_speed_is_that_of_the_last_minute(live):
    now = time.time()
    add_lines(
        live.run_dir / "actors/a.jsonl", *(beat(now - 300 + 5 * n, num_images=2 * max(0, n - 40)) for n in range(60))
    )
    (actor,) = actors_of(live).values()
    assert actor["images_per_s"] == pytest.approx(0.4, rel=0.1)
    assert actor["tokens_per_s"] is None


def test_a_rotated_file_keeps_the_history(live):
    folder, now = live.run_dir / "actors", time.time()
    client = ask(live.run_dir.parent)
    add_lines(folder / "a-0.jsonl", *(beat(now - 100 + n, "a-0") for n in range(50)))
    assert len(client.get("/api/run/live/fleet").json()["actors"][0]["history"]) == 50
    (folder / "a-0.jsonl").rename(folder / "a-0.1.jsonl")
    add_lines(folder / "a-0.jsonl", *(beat(now - 50 + n, "a-0") for n in range(10)))
    (actor,) = client.get("/api/run/live/fleet").json()["actors"]
    assert len(actor["history"]) == 60
    assert actor["actor"] == "a-0"


def test_long_histories_are_thinned(live):
    add_lines(live.run_dir / "actors/a.jsonl", *(beat(1e9 + 5 * n) for n in range(21_000)))
    (actor,) = actors_of(live).values()
    assert len(actor["history"]) == 400
    assert actor["history"][-1][0] == 1e9 + 5 * 20_999


def test_hostile_heartbeats_are_counted_or_cut(live):
    folder = live.run_dir / "actors"
    lines = [
        {"time": "now"},
        b"\xff\n",
        beat(1e9, state="s" * 1000, role=["r"], policy_version=1 << 40, pid={}, queue="q"),
    ]
    add_lines(folder / "a.jsonl", *lines)
    (folder / "..%2f.jsonl").write_bytes(b"{}\n")
    (folder / "b.jsonl").symlink_to("/etc/passwd")
    actors = actors_of(live)
    assert actors.keys() == {"a", "b"}
    assert actors["a"]["state"] == "s" * 80
    assert (actors["a"]["role"], actors["a"]["policy_version"], actors["a"]["queue"]) == ("", None, None)
    assert actors["b"]["history"] == []


def test_rare_heartbeats_take_no_worker_down(tmp_path):
    config = make_config(50, heartbeat_s=60)
    with RunLog(tmp_path / "live", config, config.monitoring) as log:
        (log.run_dir / "actors").mkdir()
        for name, age in (("a", 100), ("b", 350), ("c", 370)):
            add_lines(log.run_dir / f"actors/{name}.jsonl", beat(time.time() - age, name))
        assert {name: actor["silent"] for name, actor in actors_of(log).items()} == {"a": False, "b": False, "c": True}
        assert strip_of(log)["workers"]["rollout.text"][0] == 2


def test_a_folder_of_actors_that_leads_out_of_the_run_is_not_read(live, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    add_lines(elsewhere / "secret-name.jsonl", beat(time.time()))
    (live.run_dir / "actors").rmdir()
    (live.run_dir / "actors").symlink_to(elsewhere)
    assert actors_of(live) == {}
    assert strip_of(live)["workers"] == {}


def test_a_run_in_one_process_costs_that_process(tmp_path):
    config = make_config(50)
    facts = {"resources": {"CPU": 2.0, "GPU": 1.0}}
    with RunLog(tmp_path / "live", config, config.monitoring, facts=facts) as log:
        (log.run_dir / "actors").mkdir()
        add_lines(log.run_dir / "actors/driver.jsonl", beat(time.time(), "driver", "driver"))
        (log.run_dir / "events.jsonl").write_bytes(b"")
        add_lines(log.run_dir / "events.jsonl", {"attempt": 0, "time": 0}, {"attempt": 0, "time": 3600})
        strip = strip_of(log)
    assert strip["workers"] == {"driver": [1, 1]}
    assert strip["cost"] == pytest.approx({"cpu_hours": 2.0, "gpu_hours": 1.0}, abs=0.1)
