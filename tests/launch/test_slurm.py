import os
import shutil
import subprocess
import tempfile

import pytest

from tests.heads import ROOT, environment, free_ports

# Stand-ins for Slurm's commands on one machine: they run what they are given, without the options for Slurm.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
[ "$1" != show ] || echo "$(hostname)"
"""
# And for a run that Slurm's TERM reaches: it is sent to the script, which hands it on.
ENDED = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
trap "exit 143" TERM
kill -TERM $PPID
sleep 20 & wait
"""


@pytest.fixture
def allocation(tmp_path):
    """The environment of a job on one node, and where calls of scontrol are noted."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    ports, short = free_ports(), tempfile.mkdtemp(prefix="r", dir="/tmp")  # a socket's path holds some hundred letters
    more = [f"--{name}={port}" for name, port in ports.items() if name.islower() and name != "port"]
    variables = environment(
        tmp_path, CALLS=str(tmp_path / "calls"), SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1", SLURM_JOB_NODELIST="here",
        SLURM_SUBMIT_DIR=str(tmp_path), UNIRL_VENV=str(tmp_path / "venv"), UNIRL_RAY_PORT=str(ports["port"]),
        UNIRL_RAY_ARGS=" ".join([*more, f"--temp-dir={short}", "--num-cpus=1", "--object-store-memory=200000000"]),
        **{name: str(port) for name, port in ports.items() if name.isupper()},
    )  # fmt: skip
    variables["PATH"] = f"{tools}{os.pathsep}{variables['PATH']}"
    yield variables, tmp_path
    shutil.rmtree(short, ignore_errors=True)


def run_script(allocation, *words):
    variables, folder = allocation
    script = [str(ROOT / "launch" / "slurm.sbatch"), *words]
    return subprocess.run(script, env=variables, cwd=folder, text=True, capture_output=True, check=False, timeout=200)


def test_a_job_without_a_command_says_what_it_wants(allocation):
    done = run_script(allocation)
    assert done.returncode == 2
    assert "expected a command of unirl" in done.stderr


@pytest.mark.slow
def test_the_script_starts_ray_runs_the_command_and_ends_with_its_code(allocation):
    done = run_script(allocation, "config", "keys", "learner.lr")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learner.lr: float" in done.stdout
    assert run_script(allocation, "data", "validate", "nothing").returncode == 4
    assert "requeue" not in (allocation[1] / "calls").read_text()


@pytest.mark.slow
def test_a_command_that_saved_and_ended_is_queued_again(allocation):
    _, folder = allocation
    unirl = folder / "venv" / "bin" / "unirl"
    unirl.write_text(ENDED)
    unirl.chmod(0o755)
    done = run_script(allocation, "train", "--run-dir", "/shared/run")
    assert done.returncode == 143, done.stdout + done.stderr
    calls = (folder / "calls").read_text().splitlines()
    assert calls[-2:] == ["train --run-dir /shared/run --resume auto", "requeue 7"]
