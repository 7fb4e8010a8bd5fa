import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.monitoring.made_run import make_config, make_step
from tests.monitoring.mirror_files import read_tensorboard, wandb_points
from unirl import cli
from unirl.config import MonitoringConfig
from unirl.config_rules import ConfigError
from unirl.evaluation.run_reader import read_run
from unirl.jobs.mirrors import mirrors_of
from unirl.monitoring import mirrors
from unirl.monitoring.mirrors import chosen_mirrors
from unirl.monitoring.run_log import RunLog

REPOSITORY = Path(__file__).parents[2]


class Recorder:
    """A mirror that remembers, and fails where it is told to."""

    def __init__(self, name="recorder", fails_at=()):
        self.name, self.fails_at, self.calls = name, fails_at, []

    def _note(self, what, *facts):
        self.calls.append((what, *facts))
        if what in self.fails_at:
            raise RuntimeError(f"no {what} today")

    def open(self, run):
        self._note("open", run)

    def write(self, step, values):
        self._note("write", step, values)

    def event(self, kind, fields):
        self._note("event", kind, fields)

    def close(self):
        self._note("close")


def run_with(folder, *others, steps=2):
    config = make_config()
    with RunLog(folder, config, config.monitoring, mirrors=others) as log:
        for step in range(1, steps + 1):
            log.record_step(make_step(step))
    return read_run(folder)


def test_a_mirror_gets_what_the_run_directory_gets(tmp_path):
    mirror = Recorder()
    record = run_with(tmp_path / "run", mirror)
    opened = mirror.calls[0][1]
    assert (mirror.calls[0][0], opened.id, opened.run_dir) == ("open", "run", tmp_path / "run")
    assert "num_steps: 60" in opened.settings
    written = {step: values for what, *rest in mirror.calls if what == "write" for step, values in [rest]}
    assert list(written) == [1, 2]
    for line in record.metrics:
        assert {name: value for name, value in line.items() if "/" in name} == pytest.approx(written[line["step"]])
    assert [call[1] for call in mirror.calls if call[0] == "event"] == [event["kind"] for event in record.events]
    assert mirror.calls[-1] == ("close",)


@pytest.mark.parametrize("moment", ["open", "write", "event", "close"])
def test_a_mirror_that_fails_is_told_once_and_the_run_goes_on_without_it(tmp_path, caplog, moment):
    bad, good = Recorder("bad", [moment]), Recorder("good")
    record = run_with(tmp_path / "run", bad, good, steps=3)
    assert record.run["status"] == "finished"
    assert [line["step"] for line in record.metrics] == [1, 2, 3]
    told = [event["message"] for event in record.events if event["kind"] == "mirror"]
    assert told == [f"bad failed (RuntimeError: no {moment} today); the run goes on without it"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"].count(told[0]) == 1
    assert [call[0] for call in bad.calls].count(moment) == 1
    assert [call[0] for call in good.calls].count("write") == 3
    assert good.calls[-1] == ("close",)


def test_tensorboard_holds_every_value(tmp_path):
    record = run_with(tmp_path / "run", *chosen_mirrors(MonitoringConfig(tensorboard=True)))
    read = read_tensorboard(tmp_path / "run" / "tb")
    for line in record.metrics:
        for name, value in line.items():
            if "/" in name:
                assert read[name, line["step"]] == pytest.approx(value, rel=1e-6), name


def test_nothing_is_mirrored_unless_asked():
    assert chosen_mirrors(MonitoringConfig()) == []


@pytest.mark.parametrize(
    ("setting", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "offline"}, "wandb")]
)
def test_a_package_that_is_absent_is_one_clear_error(monkeypatch, setting, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(mirrors, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ModuleNotFoundError, match=rf"expected the package {package}; got none; install it") as error:
        mirrors_of(MonitoringConfig(**setting), local=True)
    assert cli.exit_code(error.value) == cli.ENVIRONMENT


@pytest.mark.parametrize("job", ["train", "sft"])
def test_prometheus_without_ray_is_refused_before_anything_is_made(job, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([job, "--local", "monitoring.prometheus=true", f"data.cache_dir={tmp_path / 'cache'}"])
    assert ended.value.code == 2
    assert "monitoring.prometheus (true) must be false with --local" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prometheus_without_ray_is_refused():
    with pytest.raises(ConfigError, match=r"monitoring.prometheus \(true\) must be false with --local"):
        mirrors_of(MonitoringConfig(prometheus=True), local=True)


WITH_WANDB = """
import sys
from pathlib import Path
from tests.monitoring.made_run import make_config, make_step
from unirl.monitoring.mirrors import chosen_mirrors
from unirl.monitoring.run_log import RunLog
run_dir, mode, overrides = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
config = make_config(wandb=mode)
with RunLog(run_dir, config, config.monitoring, overrides=overrides, mirrors=chosen_mirrors(config.monitoring)) as log:
    for step in (1, 2, 3, 2):
        log.record_step(make_step(step))
        if step == 2 and mode == "offline" and "lose-wandb" in overrides:
            import os, signal, subprocess
            kids = subprocess.check_output(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], text=True)
            [os.kill(int(kid.split()[0]), signal.SIGKILL) for kid in kids.splitlines() if "wandb" in kid]
"""
SECRET = "0123456789" * 4


def run_with_wandb(folder, mode, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    home = {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder / "config")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITH_WANDB, str(folder / "run"), mode, *arguments],
        cwd=REPOSITORY, env=kept | home | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_wandb_offline_holds_every_value_and_no_secret(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed: its mirror is NOT tested; pip install wandb")
    done = run_with_wandb(tmp_path, "offline", f"teacher.api_key={SECRET}", WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout + done.stderr
    run_dir = tmp_path / "run"
    points = list(wandb_points(run_dir / "wandb"))
    assert [point["step"] for point in points] == [1, 2, 3, 2]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line, point in zip(lines, points, strict=True):
        for name, value in line.items():
            if "/" in name:
                assert point[name] == pytest.approx(value), name
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert any(b"pairs_per_step" in path.read_bytes() for path in files if path.suffix == ".wandb")


@pytest.mark.slow
def test_wandb_that_dies_takes_nothing_with_it(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed: its mirror is NOT tested; pip install wandb")
    done = run_with_wandb(tmp_path, "offline", "lose-wandb")
    assert done.returncode == 0, done.stderr
    record = read_run(tmp_path / "run")
    assert record.run["status"] == "finished"
    assert [line["step"] for line in record.metrics] == [1, 2, 3]
    assert len([event for event in record.events if event["kind"] == "mirror"]) == 1


def test_wandb_online_wants_credentials_and_asks_nobody(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed: its mirror is NOT tested; pip install wandb")
    done = run_with_wandb(tmp_path, "online")
    assert done.returncode == 1
    assert "expected W&B credentials; got none; run `wandb login`" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
