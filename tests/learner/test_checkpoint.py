import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner.test_learner import SCORING, weights
from unirl.learner.commits import committed, prune, step_of

STATE = {"data_position": {"epoch": 1, "next": 32}, "journal_step": 7}


def train(learner, steps):
    sampler = TinyPolicy()
    for step in steps:
        learner.update(tiny_batch(sampler, SCORING, seed=step, off_policy=0.2), step)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_resumed_run_is_bit_identical_to_the_undisturbed_one(make_learner, tmp_path, zero_stage):
    undisturbed = make_learner(TinyPolicy(), zero_stage=zero_stage, warmup_steps=4)
    train(undisturbed, range(4))
    expected = weights(undisturbed)
    first = make_learner(TinyPolicy(), zero_stage=zero_stage, warmup_steps=4)
    train(first, range(2))
    first.save(tmp_path, 2, STATE)
    resumed = make_learner(TinyPolicy(seed=5), zero_stage=zero_stage, warmup_steps=4)
    assert resumed.restore(tmp_path) == STATE
    assert resumed.policy_version == 2
    train(resumed, range(2, 4))
    got = weights(resumed)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_random_number_states_come_back(make_learner, tmp_path):
    make_learner(TinyPolicy()).save(tmp_path, 1, {})
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    make_learner(TinyPolicy()).restore(tmp_path)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_newest_checkpoints_are_kept(make_learner, tmp_path):
    learner = make_learner(TinyPolicy())
    for step in (1, 2, 3, 3):
        learner.save(tmp_path, step, {})
        prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert (tmp_path / "latest").read_text() == "step_00000003"


@pytest.mark.parametrize(
    ("keep", "onsets", "left"),
    [
        (2, [], [8, 10]),
        (2, [7], [6, 8, 10]),
        (2, [6], [4, 8, 10]),
        (2, [9], [8, 10]),
        (2, [2], [8, 10]),
        (2, [2, 3, 7], [2, 6, 8, 10]),
        (0, [2], [2, 4, 6, 8, 10]),
    ],
)
def test_the_newest_from_before_a_run_went_wrong_is_kept(tmp_path, keep, onsets, left):
    for step in (2, 4, 6, 8, 10):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "COMMIT.json").write_text('{"files": {}}')
    prune(tmp_path, keep, onsets=onsets)
    assert [step_of(folder) for folder in committed(tmp_path)] == left


@pytest.mark.parametrize("damage", ["truncate", "remove", "uncommitted", "torn commit"])
def test_broken_checkpoint_is_skipped_with_a_warning(make_learner, tmp_path, caplog, damage):
    learner = make_learner(TinyPolicy())
    learner.save(tmp_path, 1, {"at": 1})
    train(learner, range(1))
    learner.save(tmp_path, 2, {"at": 2})
    newest = tmp_path / "step_00000002"
    victim = max(newest.glob("*optim_states.pt"), key=lambda file: file.stat().st_size)
    match damage:
        case "truncate":
            os.truncate(victim, victim.stat().st_size // 2)
        case "remove":
            victim.unlink()
        case "uncommitted":
            (newest / "COMMIT.json").unlink()
        case "torn commit":
            os.truncate(newest / "COMMIT.json", 20)
    fresh = make_learner(TinyPolicy(seed=1))
    assert fresh.restore(tmp_path) == {"at": 1}
    assert f"{newest} is skipped" in caplog.text


def test_leftovers_of_an_unfinished_save_are_removed(make_learner, tmp_path):
    make_learner(TinyPolicy()).save(tmp_path, 1, {})
    (tmp_path / ".tmp-step_00000002").mkdir()
    make_learner(TinyPolicy()).restore(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


def test_no_checkpoint_is_a_clear_error(make_learner, tmp_path):
    with pytest.raises(FileNotFoundError, match="got none; start the run without --resume"):
        make_learner(TinyPolicy()).restore(tmp_path)


def test_another_layout_is_a_clear_error(make_learner, tmp_path):
    make_learner(TinyPolicy(), zero_stage=2).save(tmp_path, 1, {})
    with pytest.raises(ValueError, match=r"'learner.zero_stage': 3.*got .*'learner.zero_stage': 2.*model.path"):
        make_learner(TinyPolicy(), zero_stage=3).restore(tmp_path)


def test_state_that_json_cannot_hold_is_refused_before_anything_is_written(make_learner, tmp_path):
    with pytest.raises(TypeError):
        make_learner(TinyPolicy()).save(tmp_path, 1, {"x": object()})
    assert not list(tmp_path.iterdir())


def test_checkpoint_that_would_run_code_is_refused(make_learner, tmp_path):
    make_learner(TinyPolicy()).save(tmp_path, 1, {})
    folder = tmp_path / "step_00000001"
    victim = next(folder.glob("*model_states.pt"))
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (flag,))

    torch.save({"module": Evil()}, victim)
    commit = json.loads((folder / "COMMIT.json").read_text())
    commit["files"][victim.name] = victim.stat().st_size
    (folder / "COMMIT.json").write_text(json.dumps(commit))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_learner(TinyPolicy()).restore(tmp_path)
    assert not flag.exists()


def test_kill_in_the_middle_of_a_save_leaves_a_checkpoint_to_load(make_learner, tmp_path):
    root = tmp_path / "checkpoints"
    child = subprocess.Popen([sys.executable, "-m", "tests.learner.saving_process", str(root)])
    try:
        _stop_inside_a_save(child, root)
    finally:
        child.kill()
        child.wait()
    unfinished = list(root.glob(".tmp-*"))
    assert unfinished
    assert not (unfinished[0] / "COMMIT.json").exists()
    learner = make_learner(TinyPolicy(seed=3))
    state = learner.restore(root)
    assert state["saved"] == learner.policy_version
    assert not list(root.glob(".tmp-*"))
    train(learner, [0])


def _stop_inside_a_save(child, root, timeout_s=120):
    """Freeze the process when a checkpoint is being written and an earlier one is committed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert child.poll() is None, "the saving process ended by itself"
        if any(root.glob(".tmp-step_*/*.pt")) and any(root.glob("step_*")):
            child.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            if any(root.glob(".tmp-step_*/*.pt")) and not any(root.glob(".tmp-step_*/COMMIT.json")):
                return
            child.send_signal(signal.SIGCONT)
        time.sleep(0.002)
    raise TimeoutError("never met the process inside a save")
