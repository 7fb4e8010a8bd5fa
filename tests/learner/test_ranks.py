import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fakes import TinyPolicy
from tests.janus_checkpoints import write_janus
from tests.learner.rank_process import NUM_STEPS, arrays_of, learner_of, take_steps
from unirl.learner.engine import RankPlace

TOLERANCE = 1e-4
"""A tenth of the learning rate, after three updates of AdamW in float32.

AdamW divides a gradient by its own size, so a rounding of 1e-8 in a gradient of 1e-7 is a tenth of a step.
"""


def start_two(module, out, timeout_s):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", f"tests.learner.{module}"]
    ranks = [subprocess.Popen([*command, str(rank), "2", str(port), str(out)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=timeout_s) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Everything that two ranks did, in one pair of processes, since starting them takes most of the time."""
    out = tmp_path_factory.mktemp("ranks")
    write_janus(out / "janus")
    start_two("rank_process", out, timeout_s=240)
    return out


def reports(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank():
    """Metrics and weights of one rank at ZeRO 2, with and without several passes per row."""
    results = {}
    for masked in (False, True):
        learner = learner_of(RankPlace(), masked=masked, zero_stage=2)
        results[masked] = (take_steps(learner, range(NUM_STEPS), masked=masked), arrays_of(learner))
        learner._engine.destroy()
    return results


CASES = ["stage0", "stage1", "stage2", "stage3", "stage2_masked", "stage3_masked"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_at_any_stage_give_the_weights_of_one(two_ranks, one_rank, case):
    metrics, expected = one_rank[case.endswith("masked")]
    got = np.load(two_ranks / f"{case}.npz")
    assert set(got) == set(expected)
    assert max(float(np.abs(got[name].astype("f8") - expected[name]).max()) for name in expected) < TOLERANCE
    moved = np.abs(expected["trunk.0.weight"] - TinyPolicy().module.trunk[0].weight.detach().numpy()).max()
    assert moved > 20 * TOLERANCE
    for got_step, wanted_step in zip(reports(two_ranks)[0][case], metrics, strict=True):
        for name in ("learner/loss", "learner/grad_norm", "policy/kl", "policy/clip_fraction", "policy/ratio_max"):
            assert got_step[name] == pytest.approx(wanted_step[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_ranks_report_the_same_metrics(two_ranks, case):
    one, other = (
        [{k: v for k, v in step.items() if not k.endswith("_s")} for step in r[case]] for r in reports(two_ranks)
    )
    assert one == other


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_rank_gives_the_same_weights_at_any_stage(one_rank, stage):
    learner = learner_of(RankPlace(), zero_stage=stage)
    take_steps(learner, range(NUM_STEPS))
    got, expected = arrays_of(learner), one_rank[False][1]
    learner._engine.destroy()
    assert max(float(np.abs(got[name].astype("f8") - expected[name]).max()) for name in expected) < TOLERANCE


@pytest.mark.parametrize("stage", [2, 3])
def test_full_disk_on_one_rank_fails_on_all_and_leaves_the_last_checkpoint(two_ranks, stage):
    folder = two_ranks / f"checkpoints{stage}"
    for report in reports(two_ranks):
        message = report[f"full{stage}"]
        assert message.startswith(f"OSError: checkpoint: expected to write {folder}; got rank 1: ")
        assert "File too large" in message
        assert "resume from the last committed checkpoint" in message
        assert report[f"restored{stage}"] == {"at": 1}
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["step_00000001"]


@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_ranks_continue_bit_identically_and_export_what_they_hold(two_ranks, stage):
    undisturbed, resumed = np.load(two_ranks / f"stage{stage}.npz"), np.load(two_ranks / f"resumed{stage}.npz")
    exported = load_file(two_ranks / f"policy{stage}" / "model.safetensors")
    for name in undisturbed:
        assert np.array_equal(undisturbed[name], resumed[name])
        assert np.array_equal(exported[name], resumed[name])


def test_checkpoint_of_two_ranks_is_refused_by_one(two_ranks):
    learner = learner_of(RankPlace(), zero_stage=2)
    with pytest.raises(ValueError, match=r"'learner.num_ranks': 1.*got .*'learner.num_ranks': 2"):
        learner.restore(two_ranks / "checkpoints2")
    learner._engine.destroy()


def test_number_that_is_none_on_one_rank_is_raised_on_all(two_ranks):
    messages = [report["poisoned"] for report in reports(two_ranks)]
    assert messages[0] == messages[1]
    assert "log-probability of generation rows" in messages[0]
    assert "(rank 1)" in messages[0]
    assert "(rank 0)" not in messages[0]


def test_ranks_with_unequal_numbers_of_images_stay_in_step(two_ranks):
    one, other = (
        [{k: v for k, v in step.items() if not k.endswith("_s")} for step in r["unequal_images"]]
        for r in reports(two_ranks)
    )
    assert one == other
    assert [step["learner/num_micro_batches"] for step in one] == [1, 1]
