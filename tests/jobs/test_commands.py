"""Commands run as processes of their own."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Timer

import pytest

from unirl.config import SftConfig
from unirl.config_loading import to_yaml
from unirl.data.atomic import DataError
from unirl.jobs.commands import CommandError, Commands, keep_settings, words_of_run
from unirl.jobs.interrupts import Interrupted


def test_a_result_in_json_comes_back_and_the_rest_goes_to_a_file(tmp_path):
    with Commands() as commands:
        assert "unirl" in commands.run("doctor", "--json")
        assert commands.run("config", "show", output=tmp_path / "log") == ""
    assert "learner:" in (tmp_path / "log").read_text()


def test_a_failure_names_the_command_its_code_and_where_its_message_is(tmp_path):
    with (
        Commands() as commands,
        pytest.raises(CommandError, match=r"expected `unirl config show wrong=1`.* 2.*log") as e,
    ):
        commands.run("config", "show", "wrong=1", output=tmp_path / "log")
    assert e.value.exit_code == 2
    assert "is not a setting" in (tmp_path / "log").read_text()


def test_a_signal_reaches_all_that_run_and_nothing_is_begun_after(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    start = time.monotonic()
    with Commands() as commands:
        Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with ThreadPoolExecutor(2) as pool:
            words = ("eval", "lab:janus", "--local")
            endings = [pool.submit(commands.run, *words, output=tmp_path / f"{n}.log").exception for n in range(3)]
        errors = [ending() for ending in endings]
    assert [type(error) for error in errors] == [Interrupted] * 3
    assert errors[0].exit_code == 143
    assert not (tmp_path / "2.log").read_text(), "the third waited for a place"
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Commands() as commands:
            os.kill(os.getpid(), signal.SIGHUP)
            commands.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_is_begun_or_gone_on_with(tmp_path):
    settings, run_dir = tmp_path / "a.yaml", tmp_path / "a"
    assert words_of_run("sft", settings, run_dir) == ["sft", "-c", settings, "--run-dir", run_dir]
    run_dir.mkdir()
    (run_dir / "run.json").write_text("{}")
    assert words_of_run("sft", settings, run_dir) == ["sft", "--resume", run_dir]


def test_settings_are_kept_once(tmp_path):
    file = tmp_path / "arm" / "seed-0.yaml"
    keep_settings(file, to_yaml(SftConfig()))
    keep_settings(file, to_yaml(SftConfig()))
    with pytest.raises(DataError, match="expected the settings that this began with"):
        keep_settings(file, "other")
    assert file.read_text() == to_yaml(SftConfig())
