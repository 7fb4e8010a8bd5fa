import subprocess
import sys

import pytest

from unirl.monitoring import control
from unirl.monitoring.control import ScaleControl, forget_orders, newest_order, order_scale, read_answer
from unirl.monitoring.folder_lock import FolderLock, is_locked


@pytest.fixture
def events():
    return []


@pytest.fixture
def drive(tmp_path, events, monkeypatch):
    """The driver's side, which looks as often as it is asked."""
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0.0)
    return ScaleControl(tmp_path, lambda *event: events.append(event))


def test_an_order_is_seen_once_and_answered_under_its_id(tmp_path, drive, events):
    assert drive.poll() is None
    name = order_scale(tmp_path, {"image": 4})
    order = drive.poll()
    assert (order.id, order.counts) == (name, {"image": 4})
    assert drive.poll() is None
    assert read_answer(tmp_path, name) is None
    drive.answer(order, "joining", "rollout.image 1 -> 4", {"image": 1})
    drive.answer(order, "joined", "rollout.image 4", {"image": 4})
    answer = read_answer(tmp_path, name)
    assert (answer["state"], answer["message"], answer["workers"]) == ("joined", "rollout.image 4", {"image": 4})
    assert [(kind, message) for kind, message, _ in events] == [
        ("scale", "rollout.image 1 -> 4"),
        ("scale", "rollout.image 4"),
    ]


def test_orders_of_an_earlier_attempt_are_not_carried_out(tmp_path, events):
    order_scale(tmp_path, {"image": 4})
    forget_orders(tmp_path)  # when the record is opened
    new = order_scale(tmp_path, {"image": 2})  # while actors start
    assert newest_order(tmp_path) == new
    drive = ScaleControl(tmp_path, lambda *event: events.append(event))
    assert drive.poll().counts == {"image": 2}
    assert drive.poll() is None


def test_a_run_that_looks_seldom_looks_again_in_time(tmp_path, events, monkeypatch):
    drive = ScaleControl(tmp_path, lambda *event: events.append(event))
    drive.poll()
    order_scale(tmp_path, {"text": 2})
    assert drive.poll() is None, "not twice within the interval"
    monkeypatch.setattr(control, "LOOK_EVERY_S", 0.0)
    assert drive.poll().counts == {"text": 2}


def test_whether_a_folder_is_being_written_is_seen_without_writing(tmp_path):
    assert not is_locked(tmp_path)
    lock = FolderLock(tmp_path)
    assert is_locked(tmp_path)
    assert asked_elsewhere(tmp_path) == "True"
    lock.release()
    assert asked_elsewhere(tmp_path) == "False"
    FolderLock(tmp_path).release()


def asked_elsewhere(folder):
    """What another process sees."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom unirl.monitoring.folder_lock import is_locked\n"
        "print(is_locked(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
