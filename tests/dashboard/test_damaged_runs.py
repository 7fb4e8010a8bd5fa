"""The run directory of a driver that was killed, and of worse."""

import json
import os
import shutil
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dashboard.conftest import NUM_STEPS, add_lines, ask
from tests.monitoring.made_run import make_config, make_step
from unirl.jobs.runs import state_of
from unirl.monitoring.run_log import RunLog


def metrics_line(step, at, attempt=0, **values):
    return {
        "v": 1,
        "step": step,
        "time": at,
        "attempt": attempt,
        "time/step_s": 10.0,
        "reward/understanding": step,
        **values,
    }


def rewrite(path, change):
    """Change run.json or another small JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def make_old(folder, age_s):
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - age_s,) * 2)


@pytest.fixture
def killed_run(own_runs):
    """SIGKILL in the middle of a line, a resume from step 8 at which the clock had gone back an hour, SIGKILL again."""
    run = own_runs / "one"
    began = time.time() - 7200
    (run / "metrics.jsonl").unlink()
    add_lines(run / "metrics.jsonl", *(metrics_line(step, began + 10 * step) for step in range(1, 11)),
              b'{"v":1,"step":11,"ti', b"\n")  # fmt: skip
    again = [metrics_line(step, began - 3600 + 10 * step, attempt=1) for step in range(9, 13)]
    add_lines(run / "metrics.jsonl", *(line | {"reward/understanding": -line["step"]} for line in again), b'{"v":1,"st')
    add_lines(run / "pairs.jsonl", b'{"v":1,"step":12,"pair_id":"torn')
    add_lines(run / "used_pairs.jsonl", b"\xff\xfe not JSON\n", b"[1,2]\n", b'{"step":"three"}\n')
    for name in sorted((run / "images").iterdir())[:3]:
        name.unlink()
    rewrite(run / "run.json", {"status": "running"})
    return own_runs


def test_a_killed_run_opens_and_says_what_it_skipped(killed_run):
    client = ask(killed_run)
    client.get("/api/run/one/similarities")
    found = client.get("/api/run/one").json()
    assert found["skipped"] == {
        "bad_lines": 4,
        "bad_files": 0,
        "refused_files": 0,
        "missing_images": 3,
        "refused_images": 0,
        "repeated_steps": 2,
        "clock_jumps": 1,
        "values_beyond_limit": 0,
    }
    curves = client.get("/api/run/one/metrics?names=reward/understanding").json()
    assert curves["steps"] == list(range(1, 13))
    assert curves["values"]["reward/understanding"] == [*range(1, 9), -9, -10, -11, -12]
    assert curves["times"] == sorted(curves["times"]), "the clock never goes back"
    assert curves["times"][-1] - curves["times"][0] == pytest.approx(130, abs=0.1)


def test_missing_pictures_are_marked_in_their_pair(killed_run):
    client = ask(killed_run)
    gone = 0
    for fact in client.get("/api/run/one/pairs").json()["pairs"]:
        pair = client.get("/api/run/one/pair", params={"step": fact["step"], "pair_id": fact["pair_id"]}).json()
        for holder in (pair["understanding"], *pair["generation"]["samples"]):
            there = (killed_run / "one" / "images" / holder["image"]).exists()
            assert holder.get("image_missing", False) is not there
            gone += not there
    assert gone == 3


def test_a_killed_driver_is_seen_at_once_by_its_free_lock(killed_run):
    """Its machine is this one; on another, age alone can tell."""
    run = killed_run / "one"
    client = ask(killed_run)
    assert client.get("/api/run/one/strip").json()["strip"]["stalled"] is True
    (listed,) = client.get("/api/runs").json()["runs"]
    assert (listed["status"], listed["stalled"]) == ("killed", True)
    assert state_of(run).status == "killed", "`unirl runs` says the same"
    rewrite(run / "run.json", {"status": "running", "host": "elsewhere"})
    assert client.get("/api/run/one/strip").json()["strip"]["stalled"] is False
    make_old(run, 299)
    assert client.get("/api/run/one/strip").json()["strip"]["stalled"] is False
    make_old(run, 301)
    strip = client.get("/api/run/one/strip").json()["strip"]
    assert (strip["status"], strip["stalled"], state_of(run).status) == ("stalled", True, "stalled")
    assert strip["age_s"] == pytest.approx(301, abs=20)
    rewrite(run / "run.json", {"status": "failed"})
    make_old(run, 301)
    assert client.get("/api/run/one/strip").json()["strip"]["stalled"] is False, "it says itself how it ended"


def test_a_driver_that_hangs_is_stalled_though_its_heart_beats(tmp_path):
    config = make_config(50, stall_after_s=100)
    with RunLog(tmp_path / "live", config, config.monitoring) as log:
        log.record_step(make_step(1, num_pairs=1))
        make_old(tmp_path / "live", 150)
        log.event("stall", "nothing has happened for 100 s; waiting for rollout")
        (tmp_path / "live" / "actors").mkdir()
        add_lines(tmp_path / "live/actors/driver.jsonl", {"time": time.time(), "actor": "driver", "role": "driver"})
        strip = ask(tmp_path).get("/api/run/live/strip").json()["strip"]
    assert strip["stalled"] is True
    assert strip["age_s"] < 60
    assert strip["workers"]["driver"] == [1, 1]


def test_a_step_that_always_takes_long_is_no_stall(tmp_path):
    config = make_config(50, stall_after_s=100)
    with RunLog(tmp_path / "live", config, config.monitoring) as log:
        for step in (1, 2):
            log.write_metrics(step, {"time/step_s": 200.0})
        make_old(tmp_path / "live", 450)
        client = ask(tmp_path)
        assert client.get("/api/run/live/strip").json()["strip"]["stalled"] is False
        make_old(tmp_path / "live", 650)
        assert client.get("/api/run/live/strip").json()["strip"]["stalled"] is True


def test_cost_counts_the_hours_of_every_start_but_no_jump_of_the_clock(tmp_path):
    config = make_config(50)
    RunLog(tmp_path / "run", config, config.monitoring).end("finished")
    (tmp_path / "run" / "events.jsonl").unlink()
    day = 86400.0
    add_lines(tmp_path / "run/events.jsonl", {"attempt": 0, "time": 0.0}, {"attempt": 1, "time": 5000.0},
              {"attempt": 1, "time": 5260.0})  # fmt: skip
    steps = [metrics_line(1, 60.0), metrics_line(2, 70.0), metrics_line(3, 80.0 + day), metrics_line(4, 90.0 + day)]
    add_lines(tmp_path / "run/metrics.jsonl", *steps, *(metrics_line(s, 5000.0 + 60 * s, 1) for s in (4, 5)))
    strip = ask(tmp_path).get("/api/run/run/strip").json()["strip"]
    # Start 0: 60 s to the first step, then three of 10 s; start 1: from 5000 to 5300, its last sign.
    cpus = 1 + 1 + 1 + 0.5 + 0.5  # learner, text, image, two rewards
    assert strip["cost"]["cpu_hours"] == pytest.approx((90 + 300) / 3600 * cpus, abs=1e-3)
    assert strip["cost"]["gpu_hours"] == 0


def test_a_file_that_shrinks_or_is_replaced_is_read_anew(own_runs):
    client, file = ask(own_runs), own_runs / "one" / "metrics.jsonl"
    ask_for = "/api/run/one/metrics?names=reward/understanding"
    cursor = client.get(ask_for).json()["cursor"]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]))
    shrunk = client.get(f"{ask_for}&since={cursor}").json()
    assert (shrunk["reset"], shrunk["steps"]) == (True, [1, 2, 3])
    longer = [metrics_line(step, 10.0 * step) for step in range(100, 160)]
    file.unlink()
    add_lines(file, *longer)
    replaced = client.get(f"{ask_for}&since={shrunk['cursor']}").json()
    assert (replaced["reset"], replaced["steps"]) == (True, list(range(100, 160)))
    file.unlink()
    assert client.get(ask_for).json()["steps"] == []


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl", "pairs.jsonl", "used_pairs.jsonl",
                                  "events.jsonl", "images", "evaluations", "actors", "lock"])  # fmt: skip
def test_any_part_may_be_missing(own_runs, name):
    path = own_runs / "one" / name
    client = ask(own_runs)
    client.get("/api/runs")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    for address in ("", "/strip", "/metrics?names=learner/loss", "/events", "/fleet", "/pairs", "/similarities",
                    "/pair_history?pair_id=pair-2-0", "/pair?step=2&pair_id=pair-2-0"):  # fmt: skip
        assert client.get(f"/api/run/one{address}").status_code in (200, 404), address


FILES = ("run.json", "config.yaml", "metrics.jsonl", "pairs.jsonl", "used_pairs.jsonl", "events.jsonl",
         f"evaluations/step_{NUM_STEPS:06d}.json")  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), data=st.data())
def test_a_file_cut_or_scribbled_on_anywhere_keeps_the_page_up(finished_run, tmp_path_factory, name, data):
    whole = (finished_run / name).read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.one_of(st.just(b""), st.binary(max_size=40), st.sampled_from(JUNK)))
    runs = tmp_path_factory.mktemp("cut")
    for other in FILES:
        (runs / "one" / other).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished_run / other, runs / "one" / other)
    (runs / "one" / name).write_bytes(whole[:cut] + junk + whole[cut + len(junk) :])
    client = ask(runs)
    for address in ("", "/metrics?names=learner/loss", "/events", "/pairs?text=a", "/similarities?window=100",
                    "/pair_history?pair_id=pair-2-0", "/pair?step=2&pair_id=pair-2-0"):  # fmt: skip
        answer = client.get(f"/api/run/one{address}")
        assert answer.status_code in (200, 404), (address, answer.text)
        json.loads(answer.text, parse_constant=pytest.fail)


JUNK = (b"\n", b"\n\n{}\n", b"null\n", b"\x00" * 30, b"[" * 3000, b'{"a":' * 2000, b"1e999", b"NaN", b"-Infinity",
        b'"\\ud800"', b"9" * 5000, b'{"step":1e3}\n', b'\n{"step":true,"pairs":7}\n', b"&a [*a]\n")  # fmt: skip


def test_of_a_pair_that_was_shown_again_the_later_line_counts(own_runs):
    client, file = ask(own_runs), own_runs / "one" / "pairs.jsonl"
    before = client.get("/api/run/one/pairs").json()
    line = json.loads(file.read_bytes().splitlines()[0])
    add_lines(file, line | {"similarity": 0.125})
    after = client.get("/api/run/one/pairs").json()
    assert after["total"] == before["total"]
    (fact,) = client.get("/api/run/one/pairs", params={"text": line["pair_id"], "step": line["step"]}).json()["pairs"]
    assert fact["similarity"] == 0.125
    asked = {"step": line["step"], "pair_id": line["pair_id"]}
    assert client.get("/api/run/one/pair", params=asked).json()["similarity"] == 0.125
    file.write_bytes(b"")
    assert client.get("/api/run/one/pairs").json() == {"total": 0, "pairs": []}
    assert client.get("/api/run/one/pair", params=asked).status_code == 404
