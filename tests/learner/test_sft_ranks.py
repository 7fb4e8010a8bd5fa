"""Two ranks at every ZeRO stage take the same steps as one."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.joint_checkpoints import write_anole
from tests.learner.sft_rank_process import NUM_STEPS, arrays_of, learner_of, take_steps
from tests.learner.test_ranks import TOLERANCE, reports, start_two
from unirl.learner.engine import RankPlace

pytestmark = pytest.mark.slow

STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    write_anole(out / "anole")
    start_two("sft_rank_process", out, timeout_s=240)
    return out


@pytest.fixture(scope="module")
def one_rank(two_ranks):
    learner = learner_of(RankPlace(), two_ranks / "anole")
    results = take_steps(learner, range(NUM_STEPS)), arrays_of(learner)
    learner.close()
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_make_the_update_of_one(two_ranks, one_rank, stage):
    metrics, arrays = one_rank
    found = np.load(two_ranks / f"stage{stage}.npz")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_allclose(found[name], array, atol=TOLERANCE, err_msg=name)
    for rank in reports(two_ranks):
        for step, expected in enumerate(metrics):
            for name in ("learner/loss", "sft/nats/text", "sft/accuracy/text", "sft/num_targets/image"):
                assert rank[f"stage{stage}"][step][name] == pytest.approx(expected[name], abs=1e-5), (step, name)
            assert rank[f"stage{stage}"][step]["learner/grad_norm"] == pytest.approx(
                expected["learner/grad_norm"], rel=1e-4
            )


def test_partitioned_weights_are_exported_whole(two_ranks):
    exported, gathered = load_file(two_ranks / "policy3" / "model.safetensors"), np.load(two_ranks / "stage3.npz")
    for name in gathered:
        np.testing.assert_array_equal(exported[name], gathered[name], err_msg=name)
    assert any("vqmodel" in name for name in exported), "the image tokenizer goes along"
