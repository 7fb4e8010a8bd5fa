import json
import signal

import pytest

from unirl import cli
from unirl.config import RlConfig
from unirl.jobs.interrupts import Interrupted, Interrupts
from unirl.jobs.run_dirs import choose_run_dir, has_checkpoint, newest_unfinished


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, status in (("20260101-a", "interrupted"), ("20260102-a", "running"), ("20260103-a", "finished"),
                         ("20260104-b", "running")):  # fmt: skip
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": status}))
        (folder / "config.yaml").write_text("learner:\n  lr: 0.0001\n")


def test_auto_means_the_newest_unfinished_run_of_the_name():
    assert newest_unfinished("a").name == "20260102-a"
    with pytest.raises(FileNotFoundError, match="expected an unfinished run named c"):
        newest_unfinished("c")


def test_resume_auto_takes_the_settings_of_the_run_and_overrides_on_top(monkeypatch):
    seen = {}
    monkeypatch.setattr("unirl.jobs.rl.main", lambda config, **rest: seen.update(rest, config=config) or 0)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--resume", "auto", "train.name=a", "learner.warmup_steps=9"])
    assert not ended.value.code
    assert seen["resume"].endswith("20260102-a")
    assert seen["config"].learner.lr == 0.0001
    assert seen["config"].learner.warmup_steps == 9


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a run directory with a run\.json"):
        choose_run_dir(RlConfig(), str(tmp_path))
    assert not has_checkpoint(tmp_path)


def test_a_new_run_is_named_after_the_time_and_the_config():
    chosen, resumed = choose_run_dir(RlConfig(), None)
    assert not resumed
    assert chosen.name.endswith("-lab")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_second_ends_at_once(signum, code):
    before = signal.getsignal(signum)
    with Interrupts() as interrupts:
        interrupts.check()
        signal.raise_signal(signum)
        assert interrupts.received
        with pytest.raises(Interrupted) as asked:
            interrupts.check()
        assert asked.value.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signum)
    assert signal.getsignal(signum) == before
