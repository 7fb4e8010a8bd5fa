"""Whole runs of the training job as a user starts them: processes of their own."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unirl.monitoring.journal import step_file

SMALL = (
    "rollout.pairs_per_step=4", "rollout.num_understanding=4", "rollout.num_generation=4", "train.num_steps=5",
    "train.save_every=2", "evaluation.enabled=false", "data.max_pairs=64",
)  # fmt: skip
UNIRL = str(Path(sys.executable).with_name("unirl"))
IN_ONE_PROCESS = ("--local", "rollout.backend=torch")


def start(folder, run, *arguments, job="train"):
    command = [UNIRL, job, f"data.cache_dir={folder / 'cache'}", *arguments]
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2], start_new_session=True)


def finish(process, folder, run, code=0):
    assert process.wait(timeout=280) == code, (folder / f"{run}.log").read_text()[-3000:]


def has_step(run_dir, step):
    """Whether metrics.jsonl holds the step."""
    file = run_dir / "metrics.jsonl"
    return file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines())


def wait_for_step(run_dir, step, process):
    """Until metrics.jsonl holds the step."""
    signal_at_step({run_dir: process}, step, {})


def has_journal(run_dir, step):
    """Whether the step was recorded whole."""
    return step_file(run_dir, step).exists()


def signal_at_step(processes, step, signals, seen=has_step):
    """Each run of {run_dir: process} gets its signal, if it has one, as soon as the step is seen in metrics.jsonl."""
    waiting = dict(processes)
    for _ in range(4800):
        for run_dir, process in list(waiting.items()):
            if seen(run_dir, step):
                if run_dir in signals:
                    os.killpg(process.pid, signals[run_dir])
                del waiting[run_dir]
            else:
                assert process.poll() is None, f"{run_dir} ended before the step"
        if not waiting:
            return
        time.sleep(0.05)
    pytest.fail(f"no step {step} in {list(waiting)}")


def weights_of(run_dir):
    return hashlib.sha256((run_dir / "policy" / "model.safetensors").read_bytes()).hexdigest()
