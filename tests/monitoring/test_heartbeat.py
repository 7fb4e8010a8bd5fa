import errno
import json
import os
import random
import subprocess
import sys
import time

import pytest

from unirl.monitoring import heartbeat
from unirl.monitoring.durable_files import JsonLines
from unirl.monitoring.heartbeat import Heartbeat

FIELDS = {
    "v": int, "time": float, "actor": str, "role": str, "state": str, "queue": int, "policy_version": int,
    "num_done": int, "num_tokens": int, "num_images": int, "num_passes": int, "memory_mb": float,
    "pid": int, "node": str,
}  # fmt: skip


def lines_of(folder, name="rollout-text-0.jsonl"):
    path = folder / "actors" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


def beating(folder, every_s=0.02, **arguments):
    return Heartbeat("rollout-text-0", "rollout.text", folder=folder / "actors", every_s=every_s, **arguments)


def test_lines_say_what_the_actor_is_doing(tmp_path):
    with beating(tmp_path) as beat:
        wait_for(lambda: lines_of(tmp_path))
        with beat.at("sampling", queue=3):
            beat.policy_version, beat.num_done, beat.num_tokens = 7, 2, 50
            wait_for(lambda: lines_of(tmp_path)[-1]["state"] == "sampling")
            during = lines_of(tmp_path)[-1]
        wait_for(lambda: lines_of(tmp_path)[-1]["state"] == "idle")
    assert {name: type(value) for name, value in during.items()} == FIELDS
    assert lines_of(tmp_path)[0]["state"] == "loading"
    assert (during["queue"], during["num_tokens"], during["pid"]) == (3, 50, os.getpid())
    assert 10 < during["memory_mb"] < 1e5
    number = len(lines_of(tmp_path))
    time.sleep(0.1)
    assert len(lines_of(tmp_path)) == number, "it ended"


def fail(beat):
    with beat.at("sampling"):
        assert beat.line()["state"] == "decoding"
        raise ZeroDivisionError


def test_a_look_finds_a_closer_word_and_errors_of_the_work_leave_it_idle(tmp_path):
    closer = ["decoding"]
    with beating(tmp_path, look=lambda: closer[0]) as beat:
        with pytest.raises(ZeroDivisionError):
            fail(beat)
        closer[0] = None
        assert beat.line()["state"] == "idle"


@pytest.mark.parametrize(("every_s", "has_folder"), [(0.0, True), (5.0, False)])
def test_no_period_or_no_run_directory_writes_nothing(tmp_path, every_s, has_folder):
    folder = tmp_path / "actors" if has_folder else None
    with Heartbeat("driver", "driver", folder=folder, every_s=every_s) as beat, beat.at("sampling"):
        pass
    assert not (tmp_path / "actors").exists()


def test_long_files_are_turned_over_once(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "MAX_BYTES", 1000)
    with beating(tmp_path):
        wait_for(lambda: len(lines_of(tmp_path, "rollout-text-0.1.jsonl")) > 2 and lines_of(tmp_path))
    assert sorted(path.name for path in (tmp_path / "actors").iterdir()) == [
        "rollout-text-0.1.jsonl",
        "rollout-text-0.jsonl",
    ]
    assert (tmp_path / "actors" / "rollout-text-0.1.jsonl").stat().st_size < 1500


def test_a_full_disk_is_said_once_and_lines_go_on_when_there_is_room(tmp_path, monkeypatch, caplog):
    full, append = [True], JsonLines.append

    def refuse(self, record):
        if full[0]:
            raise OSError(errno.ENOSPC, "no space left")
        append(self, record)

    monkeypatch.setattr(JsonLines, "append", refuse)
    with beating(tmp_path):
        wait_for(lambda: caplog.records)
        time.sleep(0.1)
        full[0] = False
        wait_for(lambda: lines_of(tmp_path))
    assert len(caplog.records) == 1
    assert "no space left" in caplog.text


def test_beating_draws_no_random_number(tmp_path):
    random.seed(3)
    wanted = random.random()
    random.seed(3)
    with beating(tmp_path):
        wait_for(lambda: len(lines_of(tmp_path)) > 3)
    assert random.random() == wanted


def test_it_does_not_keep_a_process_alive_and_its_successor_goes_on(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from unirl.monitoring.heartbeat import Heartbeat\n"
        "Heartbeat('rollout-text-0', 'rollout.text', folder=Path(sys.argv[1]), every_s=0.01); time.sleep(0.2)"
    )
    for starts in (1, 2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "actors")], check=True, timeout=20)
        assert len({line["pid"] for line in lines_of(tmp_path)}) == starts
