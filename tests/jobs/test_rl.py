"""Whole runs of the training job as a user starts them: processes of their own, killed for real."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unirl.monitoring.journal import read_step

SMALL = (
    "rollout.pairs_per_step=4", "rollout.num_understanding=4", "rollout.num_generation=4", "train.num_steps=5",
    "train.save_every=2", "evaluation.enabled=false", "data.max_pairs=64",
)  # fmt: skip
UNIRL = str(Path(sys.executable).with_name("unirl"))
IN_ONE_PROCESS = ("--local", "rollout.backend=torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def start(folder, run, *arguments):
    command = [UNIRL, "train", f"data.cache_dir={folder / 'cache'}", *arguments]
    with (folder / f"{run}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2], start_new_session=True)


def finish(process, folder, run, code=0):
    assert process.wait(timeout=280) == code, (folder / f"{run}.log").read_text()[-3000:]


def wait_for_step(run_dir, step, process):
    """Until metrics.jsonl holds the step."""
    for _ in range(2400):
        file = run_dir / "metrics.jsonl"
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines()):
            return
        assert process.poll() is None, "the run ended before the step"
        time.sleep(0.1)
    pytest.fail(f"no step {step} in {run_dir}")


def weights_of(run_dir):
    return hashlib.sha256((run_dir / "policy" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(folder):
    run_dir = folder / "undisturbed"
    finish(start(folder, "undisturbed", f"train.run_dir={run_dir}", *SMALL, *IN_ONE_PROCESS), folder, "undisturbed")
    return run_dir


def test_a_run_leaves_metrics_journal_policy_and_report(undisturbed):
    metrics = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert all(line["policy/logprob_gap_max"] < 1e-4 for line in metrics)
    assert all(line["rollout/num_restarts"] == line["reward/num_restarts"] == 0 for line in metrics)
    assert metrics[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert len(read_step(undisturbed, 5)) == 4 * 2 * 4
    assert json.loads((undisturbed / "run.json").read_text())["status"] == "finished"
    assert "<svg" in (undisturbed / "report.html").read_text()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_resumed_run_ends_with_the_weights_of_the_undisturbed_one(folder, undisturbed, signum, code):
    name = signal.Signals(signum).name
    run_dir = folder / name
    process = start(folder, name, f"train.run_dir={run_dir}", *SMALL, *IN_ONE_PROCESS)
    wait_for_step(run_dir, 3, process)
    os.killpg(process.pid, signum)
    finish(process, folder, name, code)
    finish(start(folder, name, "--resume", str(run_dir), *IN_ONE_PROCESS), folder, name)
    assert weights_of(run_dir) == weights_of(undisturbed)
    for step in range(1, 6):
        ours, theirs = read_step(run_dir, step), read_step(undisturbed, step)
        assert [row.completion_ids.tolist() for row in ours] == [row.completion_ids.tolist() for row in theirs]


def test_an_interrupt_loses_no_evaluation(folder, undisturbed):
    """Every step is due one, so the interrupted step is, whichever it is."""
    run_dir = folder / "evaluated"
    evaluated = ("evaluation.enabled=true", "evaluation.every=1", "evaluation.num_prompts=4", "evaluation.greedy=false")
    process = start(folder, "evaluated", f"train.run_dir={run_dir}", *SMALL, *evaluated, *IN_ONE_PROCESS)
    wait_for_step(run_dir, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, folder, "evaluated", 130)
    before = {path.name: path.stat().st_mtime_ns for path in (run_dir / "evaluations").glob("*.json")}
    assert len(before) < 5
    finish(start(folder, "evaluated", "--resume", str(run_dir), *IN_ONE_PROCESS), folder, "evaluated")
    after = {path.name: path.stat().st_mtime_ns for path in (run_dir / "evaluations").glob("*.json")}
    assert sorted(after) == [f"step_{step:06d}.json" for step in range(6)]
    assert before.items() <= after.items()
    assert weights_of(run_dir) == weights_of(undisturbed)


def test_ray_vllm_and_deepspeed_run_the_step_with_evaluation_before_and_after(folder, undisturbed):
    run_dir = folder / "ray"
    evaluated = ("evaluation.enabled=true", "evaluation.num_prompts=8", "train.num_steps=2")
    finish(start(folder, "ray", f"train.run_dir={run_dir}", *SMALL, *evaluated), folder, "ray")
    assert sorted(path.name for path in (run_dir / "evaluations").glob("*.json")) == [
        "step_000000.json",
        "step_000002.json",
    ]
    result = json.loads((run_dir / "evaluations" / "step_000002.json").read_text())
    assert result["estimates"]["generation/sampled/lab_verifier/exact"]["num"] == 8
    assert result["estimates"]["understanding/greedy/accuracy"]["num"] == 8
    # The engines draw what the plain sampler draws; the learner and the rewards are the same.
    for step in (1, 2):
        ours, theirs = read_step(run_dir, step), read_step(undisturbed, step)
        assert [row.completion_ids.tolist() for row in ours] == [row.completion_ids.tolist() for row in theirs]
    measured = subprocess.run(
        [UNIRL, "eval", str(run_dir), "--local", "--json", "rollout.backend=torch"],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    estimates = json.loads(measured.stdout)["estimates"]
    assert (
        estimates["generation/greedy/lab_verifier/exact"] == result["estimates"]["generation/greedy/lab_verifier/exact"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_resumed_run_through_ray_vllm_and_deepspeed_is_bit_identical(folder, signum):
    name = f"ray-{signal.Signals(signum).name}"
    whole, broken = folder / f"{name}-whole", folder / f"{name}-broken"
    finish(start(folder, name, f"train.run_dir={whole}", *SMALL), folder, name)
    process = start(folder, name, f"train.run_dir={broken}", *SMALL)
    wait_for_step(broken, 3, process)
    os.kill(process.pid, signum)
    process.wait(timeout=120)
    finish(start(folder, name, "--resume", str(broken)), folder, name)
    assert weights_of(broken) == weights_of(whole)


def test_a_finished_run_says_so_and_a_new_one_does_not_overwrite_it(folder, undisturbed):
    before = (undisturbed / "run.json").read_bytes()
    for arguments, code, words in (
        (["--resume", str(undisturbed)], 0, "is finished; to go further, add train.num_steps=N above 5"),
        (["--resume", str(undisturbed), "train.num_steps=3"], 2, "must be at least 5"),
        (["--run-dir", str(undisturbed), "--local"], 4, f"--resume {undisturbed}"),
    ):
        result = run_unirl(folder, *arguments)
        assert result.returncode == code, result.stderr
        assert words in result.stderr + result.stdout
    assert (undisturbed / "run.json").read_bytes() == before


def test_ctrl_c_while_actors_start_ends_at_once(folder):
    run_dir = folder / "early"
    process = start(folder, "early", f"train.run_dir={run_dir}", *SMALL)
    log = folder / "early.log"
    for _ in range(1200):
        if "starting" in log.read_text():
            break
        time.sleep(0.1)
    time.sleep(3.0)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, folder, "early", 130)
    assert "ended without saving" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"


def run_unirl(folder, *arguments):
    return subprocess.run(
        [UNIRL, "train", f"data.cache_dir={folder / 'cache'}", *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["learner.learning_rate=1"], 2, "learner.lr"),
        (["model.family=lumina"], 2, "janus_pro"),
        (["model.path=nowhere"], 4, "expected"),
        (["data.pairs=nowhere"], 4, "expected"),
        (["learner.num_gpus=1", "--dry-run"], 2, "does not fit: GPU 1 needed, 0 present"),
        (["learner.num_ranks=200", "--dry-run"], 2, "does not fit: CPU 203 needed"),
        (["learner.num_ranks=200"], 5, "CPU 203 needed"),
        (["rewards.generation.hpsv2.options.checkpoint=nowhere.pt", "--dry-run"], 2, "must be an existing file"),
        (["--local", "learner.num_ranks=2"], 2, "must be 1 with --local"),
    ],
)
def test_a_mistake_is_one_clear_error_before_anything_starts(folder, arguments, code, words):
    result = run_unirl(folder, *arguments)
    assert result.returncode == code, result.stderr
    assert words in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_gpu_that_is_not_there_is_named_with_the_plan(folder):
    result = run_unirl(folder, "learner.num_gpus=1", f"train.run_dir={folder / 'gpu'}")
    assert result.returncode == 5, result.stderr
    assert "GPU 1 needed, 0 present" in result.stderr


def test_prompts_that_are_too_long_end_the_run_before_its_first_step(folder):
    result = run_unirl(folder, "rollout.max_model_len=60", f"train.run_dir={folder / 'long'}")
    assert result.returncode == 4, result.stderr
    assert "set rollout.max_model_len=72" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "long" / "metrics.jsonl").read_text()
