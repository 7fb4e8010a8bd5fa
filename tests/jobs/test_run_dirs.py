import json
import signal
import time

import pytest

from unirl import cli
from unirl.config import RlConfig
from unirl.config_rules import ConfigError
from unirl.jobs.interrupts import AGAIN_AFTER_S, Interrupted, Interrupts
from unirl.jobs.run_dirs import check_changes, choose_run_dir, is_complete, last_step, newest_unfinished


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    statuses = {
        "20260101-000000-a": ("a", "interrupted"),
        "chosen": ("a", "running"),
        "20260103-000000-a": ("a", "finished"),
        "20260104-000000-b": ("b", "running"),
        "20260105-000000-not-a": ("not-a", "running"),
    }
    for number, (name, (run, status)) in enumerate(statuses.items()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": status, "created": f"2026-01-0{number + 1}T00:00:00Z"}))
        (folder / "config.yaml").write_text(f"learner:\n  lr: 0.0001\ntrain:\n  name: {run}\n")


def test_auto_means_the_newest_unfinished_run_of_the_name():
    assert newest_unfinished("a").name == "chosen"
    with pytest.raises(FileNotFoundError, match=r"expected an unfinished run with train\.name=c"):
        newest_unfinished("c")


def test_resume_auto_takes_the_settings_of_the_run_and_overrides_on_top(monkeypatch):
    seen = {}
    monkeypatch.setattr("unirl.jobs.rl.main", lambda config, **rest: seen.update(rest, config=config) or 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--resume", "auto", "train.name=a", "learner.warmup_steps=9"])
    assert not ended.value.code
    assert seen["resume"].endswith("chosen")
    assert seen["config"].learner.lr == 0.0001
    assert seen["config"].learner.warmup_steps == 9


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a run directory with a run\.json"):
        choose_run_dir(RlConfig(), str(tmp_path))
    assert last_step(tmp_path) is None


def test_a_new_run_is_named_after_the_time_and_the_config():
    chosen, resumed = choose_run_dir(RlConfig(), None)
    assert not resumed
    assert chosen.name.endswith("-lab")


def test_auto_with_a_run_directory_goes_on_there_or_starts_there(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("unirl.jobs.rl.main", lambda config, **rest: seen.update(rest, config=config) or 0)
    for folder, resume in (("runs/20260104-000000-b", "runs/20260104-000000-b"), ("elsewhere", None)):
        with pytest.raises(SystemExit):
            cli.main(["train", "--resume", "auto", "--run-dir", folder])
        assert seen["resume"] == resume
        assert seen["config"].train.run_dir == folder
        assert (seen["config"].learner.lr == 0.0001) is (resume is not None)


def test_what_the_data_order_and_the_optimizer_rest_on_cannot_change():
    check_changes({"train.num_steps": [3, 5], "learner.lr": [1e-4, 1e-5]}, "runs/x")
    changed = {"train.seed": [0, 9], "learner.lr": [1e-4, 1e-5], "model.path": ["a", "b"], "data.max_pairs": [None, 4]}
    with pytest.raises(ConfigError) as caught:
        check_changes(changed, "runs/x")
    assert [problem.key for problem in caught.value.problems] == ["train.seed", "model.path", "data.max_pairs"]
    assert "data.max_pairs (null -> 4) cannot change while runs/x goes on" in str(caught.value)


def commit(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "COMMIT.json").write_text("{}")


def test_a_run_is_complete_when_it_is_finished_and_no_more_is_asked(tmp_path):
    finished, unfinished = tmp_path / "runs" / "20260103-000000-a", tmp_path / "runs" / "chosen"
    for run_dir in (finished, unfinished):
        commit(run_dir, 3)
        commit(run_dir, 12)
        assert last_step(run_dir) == 12
    setting = ("train.num_epochs", 3)
    assert is_complete(finished, 12, setting)
    assert not is_complete(finished, 13, setting)
    assert not is_complete(unfinished, 12, setting), "its last evaluation is missing"
    with pytest.raises(ConfigError, match=r"train\.num_epochs \(3\) must give at least the 12 steps .*, not 11"):
        is_complete(finished, 11, setting)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_the_start_ends_at_once(signum, code):
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
        assert interrupts.exit_code == code


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(signum, code, capfd):
    before = signal.getsignal(signum)
    with Interrupts() as interrupts:
        interrupts.defer()
        interrupts.check()
        capfd.readouterr()
        signal.raise_signal(signum)
        assert interrupts.received
        assert "again ends at once" in capfd.readouterr().err
        with pytest.raises(Interrupted) as asked:
            interrupts.check()
        assert asked.value.exit_code == code
        signal.raise_signal(signum)  # the same request, by another way
        time.sleep(AGAIN_AFTER_S)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    assert signal.getsignal(signum) == before


def test_after_the_steps_a_signal_ends_at_once_again():
    with Interrupts() as interrupts:
        interrupts.defer()
        interrupts.hasten()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    with Interrupts() as interrupts:
        interrupts.defer()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            interrupts.hasten()
