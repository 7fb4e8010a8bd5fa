"""The measurements of reinforcement learning at tiny sizes: what they measure, never how fast."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from unirl import cli
from unirl.benchmarks.hf_loop import draw_pictures
from unirl.benchmarks.janus_folder import JanusSize, word, write_janus
from unirl.benchmarks.learner import LearnerBench, LearnerCase, measure_learner
from unirl.benchmarks.reward import RewardBench, measure_reward
from unirl.benchmarks.rollout import RolloutBench, RolloutCase, measure_rollout
from unirl.benchmarks.sync import WHOLE, SyncBench
from unirl.config import ImageSampling, ModelConfig, RlConfig, SamplingConfig
from unirl.jobs import bench_rl, bench_step
from unirl.jobs.bench_rl_shape import SIZES, RlShape
from unirl.models.policy import load_policy
from unirl.rollout.torch_sampler import TorchSampler
from unirl.types import GenerationSample, RolloutRequest

TINY = JanusSize(hidden=64, head_width=32, layers=2, inner=96, codes_per_side=3, num_codes=48, vision_hidden=64)


def bench(*arguments):
    """What a command prints with --json, from a process of its own: the learner shares its process group with vLLM."""
    command = [sys.executable, "-c", "from unirl.cli import main; main()", "bench", *arguments, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_janus(tmp_path_factory.mktemp("made") / "janus", TINY)


@pytest.fixture(scope="module")
def policy(checkpoint):
    return load_policy(ModelConfig(), checkpoint)


def test_the_loop_draws_what_the_sampler_would(policy, monkeypatch):
    """At the most likely code of each step both draw the same picture, so prompt, null prompt and mix are the same."""
    sample = GenerationSample(id="p", prompt=" ".join(map(word, range(4))))
    sampling = SamplingConfig()
    greedy = SamplingConfig(image=ImageSampling(temperature=0.0, guidance_scale=3.0))
    request = RolloutRequest(request_id="r", pair_id="p", task="generation", sample=sample, seeds=(0,))
    (group,) = TorchSampler(policy, 128, 8).sample([request], greedy)
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True))
    ids = torch.from_numpy(policy.encode(sample, sampling).ids).long()
    codes = draw_pictures(policy, ids.repeat(2, 1), guidance_scale=3.0, num_codes=policy.num_image_tokens)
    assert codes.shape == (2, 9)
    assert np.array_equal(codes[1].numpy(), group.trajectories[0].completion_ids)


def test_the_bare_loop_learns_what_the_learner_learns(checkpoint):
    report = measure_learner(LearnerBench(cases=(LearnerCase(name="tiny", model=checkpoint, num_rows=3, rounds=1),)))
    (table,) = report.tables
    norms = [row["first gradient norm"] for row in table.rows]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-3)
    assert [row["to nothing told apart"] for row in table.rows][3:] == [1.0, pytest.approx(1.0, abs=0.9)]
    assert norms[0] > 0
    assert table.rows[0]["ours to the loop"] == 1.0


def test_a_group_takes_one_text_pass():
    report = measure_reward(RewardBench(models=("ViT-S-32-alt",), group_size=3, side=64, rounds=1))
    (row,) = report.tables[0].rows
    assert (row["text passes, one by one"], row["text passes, ours"]) == (3, 1)
    assert row["by arithmetic"] > 1
    with pytest.raises(ValueError, match=r"open_clip architectures.*got 'nothing'"):
        measure_reward(RewardBench(models=("nothing",)))


def test_a_width_of_no_whole_heads_is_refused():
    with pytest.raises(ValueError, match="that 64 divides; got 100"):
        JanusSize(hidden=100)
    with pytest.raises(ValueError, match="--megabytes of at least 100"):
        SyncBench(megabytes=1)
    with pytest.raises(ValueError, match="--shape tiny, 1b, 7b; got 3b"):
        RlShape(size="3b")


def test_the_published_sizes_have_the_published_number_of_weights():
    from transformers import JanusForConditionalGeneration

    from unirl.benchmarks.janus_folder import config_of_size

    with torch.device("meta"):
        counts = [
            sum(value.numel() for value in JanusForConditionalGeneration(config_of_size(SIZES[name])).parameters())
            for name in ("1b", "7b")
        ]
    assert [round(count / 1e9, 2) for count in counts] == [2.08, 7.41]


def test_modes_are_those_that_the_configuration_knows():
    assert bench_step.modes_of(RlConfig())[0] == "synchronous"


@pytest.mark.slow
def test_both_samplers_are_timed(checkpoint):
    case = RolloutCase(name="tiny", model=checkpoint, concurrency=(1, 9), rounds=1)
    report = measure_rollout(RolloutBench(cases=(case,)))
    assert [row["in flight"] for row in report.tables[0].rows] == [1, 9]
    assert all(row["ours to it"] > 0 for row in report.tables[0].rows)
    assert not report.goals


@pytest.mark.slow
def test_a_synchronous_step_is_the_sum_of_its_phases(tmp_path):
    report = bench("step", "--local", "--steps", "2", "rollout.pairs_per_step=2", f"data.cache_dir={tmp_path}")
    (table,) = report["tables"]
    (row,) = table["rows"]
    parts = sum(row[phase] for phase in ("pairs", "rollout", "batch", "update", "publish"))
    assert row["pairs a step"] == 2
    assert 0.5 * row["step"] < parts < 1.5 * row["step"]
    assert 0 < row["outside"] < 0.9
    assert len(report["goals"]) == 1


@pytest.mark.slow
def test_weights_are_followed_through_the_store(capsys):
    report = bench_rl.sync(SyncBench(megabytes=100, rounds=1))
    assert bench_rl.show(report, as_json=True, save=False) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    seconds = {row["part"]: row["seconds"] for row in table["rows"]}
    assert seconds["one memory copy"] < seconds[WHOLE]
    assert report.goals[0].got < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--trained-layers", "1")])
def test_a_step_of_a_shape_moves_its_weights(options):
    phases, figures = bench("rl-shape", "--shape", "tiny", "--baseline", *options)["tables"]
    names = [row["phase"] for row in phases["rows"]]
    assert names[-5:] == ["pairs", "rollout", "batch", "update", "publish"]
    found = {row["figure"]: row["value"] for row in figures["rows"]}
    assert found["gradient norm"] > 0
    assert found["largest gap of log-probabilities, nats"] < 0.3
    assert found["pictures/s of the Hugging Face loop"] > 0
    assert (found["of them trained, millions"] < 1) == bool(options)


@pytest.mark.parametrize(("name", "known"), [("rollout", "lab, middle, narrow, 1b, 7b"), ("learner", "lab, middle")])
def test_an_unknown_model_is_a_mistake_of_usage(name, known, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--model", "nope"])
    assert ended.value.code == 2
    assert f"--model: expected one of {known} or a Janus checkpoint folder; got nope" in capsys.readouterr().err
