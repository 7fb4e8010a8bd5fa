"""Whole runs of the training job as a user starts them: processes of their own, killed for real."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.jobs.runs import IN_ONE_PROCESS, SMALL, finish, has_journal, signal_at_step, start, wait_for_step, weights_of
from unirl import cli
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.jobs import replay
from unirl.jobs.assets import resolve_checkpoint
from unirl.jobs.parts import open_learner
from unirl.monitoring.journal import read_step, weights_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


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


def actors_of(run_dir):
    """The last heartbeat of each actor."""
    files = sorted((run_dir / "actors").iterdir())
    return {file.stem: json.loads(file.read_text().splitlines()[-1]) for file in files}


def check_phases(metrics):
    """Phases of a synchronous run, of which none is left out."""
    for line in metrics:
        phases = {name: value for name, value in line.items() if name.startswith("phase/")}
        assert sum(phases.values()) == pytest.approx(line["time/step_s"], abs=1e-6)
        assert all(value > 0 for value in phases.values()), phases
        assert phases["phase/score_s"] + phases["phase/backward_s"] <= line["time/update_s"]


def test_a_run_tells_where_its_time_went_and_how_the_tasks_gradients_agree(undisturbed):
    metrics = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    check_phases(metrics)
    assert ["learner/grad_cosine" in line for line in metrics] == [True, False, False, False, False]
    assert -1 <= metrics[0]["learner/grad_cosine"] <= 1
    assert all(line["learner/grad_norm/understanding"] > 0 < line["learner/grad_norm/generation"] for line in metrics)
    driver = actors_of(undisturbed)["driver"]
    assert (driver["role"], driver["num_done"], driver["policy_version"]) == ("driver", 5, 5)
    assert driver["num_images"] == 5 * 4 * 4
    shown = [json.loads(line) for line in (undisturbed / "pairs.jsonl").read_text().splitlines()]
    assert all("extracted" in sample for line in shown for sample in line["understanding"]["samples"])


@pytest.fixture(scope="module")
def broken_off(folder, undisturbed):
    """Runs that were ended by a signal and resumed, side by side, with the times of their first evaluations."""
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130}
    evaluated = ("evaluation.enabled=true", "evaluation.every=1", "evaluation.num_prompts=4", "evaluation.greedy=false")
    runs = {signum: folder / signum.name for signum in codes}

    def begin(signum, *arguments):
        return start(folder, signum.name, *arguments, *IN_ONE_PROCESS)

    first = {s: begin(s, f"train.run_dir={run_dir}", *SMALL, *evaluated) for s, run_dir in runs.items()}
    signals = {runs[s]: s for s in codes}
    signal_at_step({runs[s]: process for s, process in first.items()}, 3, signals, seen=has_journal)
    for signum, process in first.items():
        finish(process, folder, signum.name, codes[signum])
    before = {signum: times_of_evaluations(run_dir) for signum, run_dir in runs.items()}
    for signum, process in {s: begin(s, "--resume", str(run_dir)) for s, run_dir in runs.items()}.items():
        finish(process, folder, signum.name)
    return {signum: (run_dir, before[signum]) for signum, run_dir in runs.items()}


def times_of_evaluations(run_dir):
    return {path.name: path.stat().st_mtime_ns for path in (run_dir / "evaluations").glob("*.json")}


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_resumed_run_ends_with_weights_journal_and_evaluations_of_the_undisturbed_one(
    undisturbed, broken_off, signum
):
    """An evaluation is due at every step, so at the interrupted one too, whichever it is."""
    run_dir, before = broken_off[signum]
    assert len(before) < 5
    assert weights_of(run_dir) == weights_of(undisturbed)
    for step in range(1, 6):
        ours, theirs = read_step(run_dir, step), read_step(undisturbed, step)
        assert [row.completion_ids.tolist() for row in ours] == [row.completion_ids.tolist() for row in theirs]
    after = times_of_evaluations(run_dir)
    assert sorted(after) == [f"step_{step:06d}.json" for step in range(6)]
    if signum != signal.SIGKILL:  # which undoes steps, whose evaluations are made again
        assert before.items() <= after.items()


def test_a_killed_run_makes_recorded_steps_again_from_the_journal_and_samples_none_of_them(broken_off):
    run_dir, _ = broken_off[signal.SIGKILL]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # The step under way may have had its metrics and not yet its journal.
    assert [line["step"] for line in lines if line["attempt"] == 0][:3] == [1, 2, 3]
    assert 3 not in [line["step"] for line in lines if line["attempt"] == 1]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert "caught up" in [event["kind"] for event in events]
    assert "alert" not in [event["kind"] for event in events if "other weights" in event["message"]]
    assert list((run_dir / "ahead").iterdir()) == []


def test_steps_of_another_course_are_forgotten_also_when_the_driver_dies_again(folder, undisturbed):
    """A rate is changed at a resume that dies at once: the old rate's later steps must not come back."""
    run_dir = shutil.copytree(undisturbed, folder / "courses")
    shutil.rmtree(run_dir / "checkpoints" / "step_00000005")  # as if it had been killed after the fifth step
    process = start(folder, "courses", "--resume", str(run_dir), "learner.lr=1e-3", *IN_ONE_PROCESS)
    log = folder / "courses.log"
    for _ in range(2400):
        if "step=5" in log.read_text():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert "caught up" not in [event["kind"] for event in events]
    finish(start(folder, "courses", "--resume", str(run_dir), *IN_ONE_PROCESS), folder, "courses")
    ours, theirs = read_step(run_dir, 5), read_step(undisturbed, 5)
    assert [row.seed for row in ours] == [row.seed for row in theirs]
    assert weights_of(run_dir) != weights_of(undisturbed)


@pytest.mark.parametrize("step", random.Random(0).sample(range(1, 6), 3))
def test_a_replayed_step_has_the_weights_of_the_run(undisturbed, step, capsys, tmp_path):
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    for left in ("logs", "ahead", "images"):  # what rollout workers and the driver wrote of them
        shutil.rmtree(run_dir / left)
    before = sorted(path.name for path in run_dir.rglob("*"))
    assert replay.main(run_dir, step, [], as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"]
    assert found["replayed"] == found["recorded"] == weights_after(undisturbed, step)
    for name, (recorded, replayed) in found["metrics"].items():
        assert replayed == pytest.approx(recorded, abs=1e-12), name
    assert sorted(path.name for path in run_dir.rglob("*")) == before


def test_the_last_step_replayed_is_the_exported_policy_by_sha256(undisturbed, capsys):
    assert replay.main(undisturbed, 5, [], as_json=True) == 0
    config = load_config([undisturbed / "config.yaml"], [])
    with open_learner(config, undisturbed / "policy") as learner:
        _, exported = replay.weights_of(learner)
    assert json.loads(capsys.readouterr().out)["sha256"] == replay.sha256_of(exported)


def test_a_replay_says_what_another_setting_would_have_done(undisturbed, capsys):
    perturb = ["algorithm.pair_weight=none", "learner.lr=6e-4"]
    assert replay.main(undisturbed, 4, perturb, as_json=True) == 0
    change = json.loads(capsys.readouterr().out)["change"]
    rows = read_step(undisturbed, 4)
    retrieved = sum(row.advantage != 0 and row.pair_weight != 1 for row in rows)
    assert change["num_other_advantages"] == retrieved > 0
    assert change["metrics"]["learner/lr"] == pytest.approx(6e-4 * 4 / 5)  # the warm-up takes five updates
    # AdamW's step is nearly proportional to its rate; the warm-up gives the fourth update 4/5 of the peak.
    assert 1.5 < change["length_ratio"] < 3.5
    assert 0.9 < change["cosine"] < 1
    assert replay.main(undisturbed, 4, ["algorithm.clip_high=0.3"], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["change"]["max_difference"] == 0  # on-policy, every ratio is 1


@pytest.mark.parametrize(
    ("step", "perturb", "error", "words"),
    [
        (9, [], DataError, "journal of every step"),
        (2, ["rollout.num_generation=2"], ConfigError, "not a setting of the update"),
        (2, ["algorithm.clip_high=-1"], ConfigError, "clip_high"),
    ],
)
def test_what_cannot_be_replayed_is_one_error(undisturbed, step, perturb, error, words):
    with pytest.raises(error, match=words):
        replay.main(undisturbed, step, perturb)


def test_a_run_that_went_on_with_other_settings_is_told_from_one_that_repeats(undisturbed, tmp_path):
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    settings = run_dir / "config.yaml"
    settings.write_text(settings.read_text().replace("lr: 0.0003", "lr: 0.0001"))
    with pytest.raises(DataError, match="weights after step 1 again"):
        replay.main(run_dir, 3, [])
    with pytest.raises(DataError, match=r"run\.json"):
        replay.main(tmp_path, 3, [])


def check_actors(run_dir):
    """Every actor's heartbeat and coming up."""
    beats = actors_of(run_dir)
    roles = {name: beat["role"] for name, beat in beats.items() if name not in ("driver", "pairing", "learner-0")}
    assert {beats["learner-0"]["role"], beats["driver"]["role"]} == {"learner", "driver"}
    assert set(roles.values()) >= {"reward.accuracy", "reward.lab_verifier"}
    assert any(role.startswith("rollout.") for role in roles.values())
    assert len({beat["pid"] for beat in beats.values()}) == len(beats)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    up = {event["actor"] for event in events if event["kind"] == "actor" and event["state"] == "up"}
    assert up == {*roles, "learner-0", "pairing"}


def test_ray_vllm_and_deepspeed_run_the_step_with_evaluation_before_and_after(folder, undisturbed, capsys):
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
    check_phases([json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])
    check_actors(run_dir)
    assert replay.main(run_dir, 2, [], as_json=True) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", str(run_dir), "--local", "--json", "rollout.backend=torch"])
    estimates = json.loads(capsys.readouterr().out)["estimates"]
    assert (
        estimates["generation/greedy/lab_verifier/exact"] == result["estimates"]["generation/greedy/lab_verifier/exact"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
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


def test_ctrl_c_while_actors_start_ends_at_once(folder):
    run_dir = folder / "early"
    process = start(folder, "early", f"train.run_dir={run_dir}", *SMALL)
    log = folder / "early.log"
    for _ in range(1200):
        if "starting" in log.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("no actor was started")
    time.sleep(3.0)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, folder, "early", 130)
    assert "ended without saving" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Run `unirl train` in this process up to its error; returns the exit code and what it printed."""
    monkeypatch.chdir(Path(__file__).parents[2])

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", f"data.cache_dir={folder / 'cache'}", *arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return ended.value.code or 0, printed.err + printed.out

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["learner.learning_rate=1"], 2, "learner.lr"),
        (["model.family=lumina"], 2, "janus_pro"),
        (["model.path=nowhere"], 4, "expected"),
        (["data.pairs=nowhere"], 4, "expected"),
        (["learner.num_gpus=1", "--dry-run"], 2, "does not fit: GPU 1 needed, 0 present"),
        (["learner.num_gpus=1"], 5, "GPU 1 needed, 0 present"),
        (["learner.num_ranks=200", "--dry-run"], 2, "does not fit: CPU 203 needed"),
        (["learner.num_ranks=200"], 5, "CPU 203 needed"),
        (["rewards.generation.hpsv2.options.checkpoint=nowhere.pt", "--dry-run"], 2, "must be an existing file"),
        (["rollout.max_model_len=60"], 4, "set rollout.max_model_len=72"),
        (["model.path={damaged}"], 4, "model.safetensors"),
        (["--local", "learner.num_ranks=2"], 2, "must be 1 with --local"),
    ],
)
def test_a_mistake_is_one_clear_error_before_anything_starts(folder, refused, arguments, code, words, tmp_path):
    damaged = shutil.copytree(resolve_checkpoint("lab:janus"), tmp_path / "damaged")
    os.truncate(damaged / "model.safetensors", 1000)
    arguments = [argument.format(damaged=damaged) for argument in arguments]
    result, printed = refused(*arguments, f"train.run_dir={folder / 'mistake'}")
    assert result == code, printed
    assert words in printed
    assert not (folder / "mistake").exists()


def test_a_finished_run_says_so_and_a_new_one_does_not_overwrite_it(refused, undisturbed):
    files = [undisturbed / name for name in ("run.json", "config.yaml", "overrides.txt", "events.jsonl")]
    before = [file.read_bytes() for file in files]
    for arguments, code, words in (
        (["--resume", str(undisturbed)], 0, "is finished; to go further, add train.num_steps=N above 5"),
        (["--resume", str(undisturbed), "train.num_steps=3"], 2, "must give at least the 5 steps that"),
        (["--resume", str(undisturbed), "train.num_steps=7", "rollout.max_model_len=60"], 4, "max_model_len=72"),
        (["--resume", str(undisturbed), "train.seed=9"], 2, "train.seed (0 -> 9) cannot change while"),
        (["--run-dir", str(undisturbed), "--local"], 4, f"--resume {undisturbed}"),
    ):
        result, printed = refused(*arguments)
        assert result == code, printed
        assert words in printed
    assert [file.read_bytes() for file in files] == before
