"""The exam's process: it ends with the run that asked for it."""

import os
import signal
import threading
import time

import pytest

from unirl.config import SftConfig
from unirl.jobs import exam
from unirl.jobs.interrupts import Interrupts


def answer_slowly(config, folder):
    """In place of the answers: says which process it is, and takes its time."""
    (folder / "pid.tmp").write_text(str(os.getpid()))
    (folder / "pid.tmp").rename(folder / "pid")
    time.sleep(100)


def test_a_signal_ends_the_exam_and_its_process_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(exam, "_answers", answer_slowly)

    def signal_later():
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_later, daemon=True).start()
    started = time.monotonic()
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        exam.take_exam(SftConfig(), tmp_path, lambda image: "")
    assert interrupts.exit_code == 143
    assert time.monotonic() - started < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
