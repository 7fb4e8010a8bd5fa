"""A family with one joint vocabulary through the same job: a whole run, and what it leaves behind.

Nothing is learned here, as no reward tells random answers apart; that both tasks learn is what `unirl verify` measures.
"""

import json

import pytest
import torch

from tests.jobs.runs import IN_ONE_PROCESS, SMALL, finish, start
from tests.joint_rollouts import NUM_CODES, write_case
from unirl import cli
from unirl.models.policy import load_interleaved, load_policy
from unirl.monitoring.journal import read_step

pytestmark = pytest.mark.slow

SHAPE = ("rollout.max_model_len=480", "rollout.sampling.image.guidance_scale=3.0", "train.num_steps=2")


def test_a_run_draws_and_answers_and_leaves_a_checkpoint_for_either_job(tmp_path):
    model, folder = write_case(tmp_path / "checkpoint", "liquid", size=20)  # what the lab's verifier looks at
    settings = (f"model.path={folder}", "model.family=liquid", f"model.image_tokenizer={model.image_tokenizer}")
    run_dir = tmp_path / "run"
    process = start(tmp_path, "run", *SMALL, *settings, *SHAPE, f"train.run_dir={run_dir}", *IN_ONE_PROCESS)
    finish(process, tmp_path, "run")
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    rows = read_step(run_dir, 2)
    assert len(rows) == 4 * 2 * 4
    pictures = [row.completion_ids for row in rows if row.task == "generation"]
    assert {len(codes) for codes in pictures} == {100}
    assert all(0 <= codes.min() <= codes.max() < NUM_CODES for codes in pictures)
    before = load_policy(model, folder).module.state_dict()
    for load in (load_policy, load_interleaved):
        after = load(model, run_dir / "policy").module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_family_whose_rows_end_in_ids_of_their_own_is_refused_by_its_key(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "model.family=emu3", "model.path=anywhere"])
    assert ended.value.code == 2
    assert "model.family (emu3) must be a family whose pictures are codes alone" in capsys.readouterr().err
