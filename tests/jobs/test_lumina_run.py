"""The masked-diffusion family through the same job: whole runs, and what is refused before anything starts."""

import json
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

from tests.jobs.runs import IN_ONE_PROCESS, SMALL, UNIRL, finish, start, wait_for_step, weights_of
from unirl import cli
from unirl.jobs.assets import resolve_checkpoint
from unirl.monitoring.journal import read_step

LUMINA = ("-c", "configs/rl/lab_lumina_dimoo.yaml", *SMALL, "rollout.sampling.image.diffusion_steps=6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lumina-runs")


@pytest.fixture(scope="module")
def undisturbed(folder):
    run_dir = folder / "undisturbed"
    finish(start(folder, "undisturbed", *LUMINA, f"train.run_dir={run_dir}", *IN_ONE_PROCESS), folder, "undisturbed")
    return run_dir


def test_a_run_records_when_each_token_was_revealed_and_learns_from_both_tasks(undisturbed):
    metrics = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert all(line["policy/logprob_gap_max"] < 2e-5 for line in metrics)
    assert metrics[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert all(line["learner/grad_norm"] > 0 for line in metrics)
    rows = read_step(undisturbed, 5)
    assert len(rows) == 4 * 2 * 4
    for row in rows:
        steps = np.asarray(row.unmask_step)
        wanted = {0, 1} if row.task == "understanding" else set(range(6))
        assert set(steps.tolist()) == wanted, row.task
        assert len(steps) == (20 if row.task == "understanding" else 25)


@pytest.mark.slow
def test_ray_workers_and_two_ranks_draw_the_same_tokens(folder, undisturbed):
    run_dir = folder / "ray"
    options = ("learner.num_ranks=2", "train.num_steps=2", "evaluation.enabled=true", "evaluation.num_prompts=8")
    finish(start(folder, "ray", *LUMINA, f"train.run_dir={run_dir}", *options), folder, "ray")
    for step in (1, 2):
        ours, theirs = read_step(run_dir, step), read_step(undisturbed, step)
        assert [row.completion_ids.tolist() for row in ours] == [row.completion_ids.tolist() for row in theirs]
    measured = subprocess.run(
        [UNIRL, "eval", str(run_dir), "--local", "--json"], capture_output=True, text=True, timeout=200, check=True
    )
    result = json.loads((run_dir / "evaluations" / "step_000002.json").read_text())
    name = "generation/greedy/lab_verifier/exact"
    assert json.loads(measured.stdout)["estimates"][name] == result["estimates"][name]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_weights_of_the_undisturbed_one(folder, undisturbed):
    run_dir = folder / "killed"
    process = start(folder, "killed", *LUMINA, f"train.run_dir={run_dir}", *IN_ONE_PROCESS)
    wait_for_step(run_dir, 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, folder, "killed", -9)
    finish(start(folder, "killed", "--resume", str(run_dir), *IN_ONE_PROCESS), folder, "killed")
    assert weights_of(run_dir) == weights_of(undisturbed)


def refused(capsys, tmp_path, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "-c", "configs/rl/lab_lumina_dimoo.yaml", f"train.run_dir={tmp_path / 'run'}", *arguments])
    assert not (tmp_path / "run").exists(), "nothing may be left behind"
    return ended.value.code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("rollout.sampling.image.size=[22, 20]", "rollout.sampling.image.size", "multiples of 4.*try [20, 20]"),
        ("rollout.sampling.image.diffusion_steps=26", "rollout.sampling.image.diffusion_steps", "at most 25.*try 25"),
        (
            "rollout.sampling.text.diffusion_steps=21",
            "rollout.sampling.text.diffusion_steps",
            "max_tokens (20).*try 20",
        ),
        ("rollout.sampling.text.block_length=7", "rollout.sampling.text.block_length", "must divide"),
        ("rollout.sampling.text.temperature=0", "rollout.sampling.text.temperature", "must be above 0"),
        ("rollout.sampling.image.approximate_cache=true", "rollout.sampling.image.approximate_cache", "must be false"),
        ("rollout.backend=vllm", "rollout.backend", "set rollout.backend=torch"),
    ],
)
def test_settings_that_the_model_cannot_serve_are_refused_before_any_compute(capsys, tmp_path, override, key, fix):
    for plan in ((), ("--dry-run",)):
        code, text = refused(capsys, tmp_path, override, *plan)
        assert code == 2
        assert key in text
        for part in fix.split(".*"):
            assert part in text


def damaged(tmp_path, damage):
    copy = shutil.copytree(resolve_checkpoint("lab:lumina_dimoo"), tmp_path / "damaged")
    damage(copy)
    return copy


def grow_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    grown = config | {"vocab_size": 256, "embedding_size": 256}
    (folder / "config.json").write_text(json.dumps(grown))


def forget_newline(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["token_roles"]["newline"]
    file.write_text(json.dumps(config))


def rename_mask(folder):
    """transformers would add the string that is gone, with an id among the image codes."""
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|mask|>", "<|msk|>"))


def add_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": config["n_layers"] + 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (grow_vocabulary, "a vocabulary of 176 ids, which ends in 96 image codes from id 80 on; got 256"),
        (forget_newline, "a string for every role under token_roles; got none for newline"),
        (lambda folder: shutil.rmtree(folder / "vqvae"), "vqvae"),
        (lambda folder: rename_mask(folder), "below the first image code 80"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: add_layer(folder), "a checkpoint without 9 of them"),
    ],
)
def test_a_checkpoint_that_would_shift_codes_or_lose_rows_is_refused(capsys, tmp_path, damage, message):
    code, text = refused(capsys, tmp_path, f"model.path={damaged(tmp_path, damage)}")
    assert code == 4
    assert message in text
