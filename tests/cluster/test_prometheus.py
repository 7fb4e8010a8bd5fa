import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.exporting import PHASES
from tests.cluster.prometheus_server import (
    FILES,
    find_binary,
    free_port,
    panel_problems,
    prometheus,
    serving,
    until_sound,
    wait_until,
)
from tests.jobs.runs import SMALL, UNIRL, has_step
from unirl.cluster.prometheus import Prometheus
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.mirrors import MirroredRun
from unirl.monitoring.panels import Panel

ROOT = Path(__file__).parents[2]
OFTEN = {"RAY_metrics_report_interval_ms": "1000"}


@contextmanager
def process(folder, *command):
    """A process with its children in a group of its own, ended when the block ends."""
    with (folder / "process.log").open("w") as log:
        started = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | OFTEN, start_new_session=True
        )
    try:
        yield started
    finally:
        started.terminate()  # the driver alone: it ends its actors
        try:
            started.wait(150)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def one(server, expression):
    ((_, value),) = server.results(expression)
    return value


def test_before_ray_is_up_and_after_its_end_nothing_is_written_and_nothing_fails(tmp_path, monkeypatch):
    # Other tests of this process may have a Ray.
    monkeypatch.setattr("unirl.cluster.prometheus.ray.is_initialized", lambda: False)
    mirror = Prometheus()
    mirror.open(MirroredRun(run_dir=tmp_path, id="run", created="", settings=""))
    mirror.write(1, {"policy/kl": 0.1, "time/step_s": 2.0, "learner/skipped_updates": 1.0})
    mirror.event("alert", {"severity": "stop"})
    mirror.close()
    assert mirror.gauges == {}


def test_the_files_are_what_prometheus_takes():
    promtool = find_binary("promtool")
    for what, file in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = subprocess.run([promtool, "check", what, FILES / file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_expression_has_values_in_a_real_prometheus(tmp_path):
    find_binary("prometheus")
    port, run_dir = free_port(), tmp_path / "made"
    with process(tmp_path, sys.executable, "-W", "ignore", "-m", "tests.cluster.exporting", run_dir, str(port)) as run:
        wait_until(lambda: serving(port, "ray_unirl_step{"), run)
        with prometheus(tmp_path, port) as server:
            assert until_sound(server, run) == []
            assert {labels["run"] for labels, _ in server.results('{__name__=~"ray_unirl_.*"}')} == {"made"}
            wrong = [("max by (run) (ray_unirl_no_such)", "{{run}}"), ("max by (run) (ray_unirl_step)", "{{task}}")]
            panels = [Panel(title="wrong", meaning="", queries=(query,)) for query in wrong]
            assert len(list(panel_problems(server, [("wrong", panels)]))) == 2
            phases = server.results(
                "sum by (phase) (ray_unirl_step_phase_seconds_total) / on () group_left () "
                "sum (ray_unirl_train_steps_total)"
            )
            assert {labels["phase"]: value for labels, value in phases} == pytest.approx(PHASES)
            assert one(server, "max by (run) (ray_unirl_weight_version_lag)") == 1
            cosine = one(server, 'max by (run) (ray_unirl_policy_grad_cosine{pair_kind="aligned"})')
            assert cosine == pytest.approx(-0.2)
            assert one(server, 'max by (run) (ray_unirl_actor_memory_bytes{actor="learner-0"})') == 250e6


@pytest.mark.slow
def test_every_expression_has_values_while_the_lab_learns(tmp_path):
    find_binary("prometheus")
    port, run_dir = free_port(), tmp_path / "lab"
    # Rewards that are left alone need no coaching: enough noise stays in groups for a few minutes.
    settings = (
        *SMALL, "train.num_steps=2000", "train.save_every=1000", "monitoring.prometheus=true", "learner.lr=1e-6",
        "monitoring.grad_cosine_every=1", f"cluster.metrics_port={port}", f"data.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    with process(tmp_path, UNIRL, "train", *settings, "--run-dir", run_dir) as run:
        wait_until(lambda: has_step(run_dir, 5), run, timeout_s=400)
        with prometheus(tmp_path, port) as server:
            assert until_sound(server, run, timeout_s=90) == []
            shown = one(server, 'max by (run) (ray_unirl_reward_mean{task="generation",pair_kind="all"})')
            step = one(server, "max by (run) (ray_unirl_step)")
    recorded = dict(read_run(run_dir).series("reward/generation"))
    near = {round(recorded[nearby], 9) for nearby in range(int(step) - 5, int(step) + 6) if nearby in recorded}
    assert round(shown, 9) in near
