import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unirl.benchmarks.diffusion import Arm, measure_sampling, measure_updates
from unirl.benchmarks.diffusion_shape import Shape
from unirl.config import ImageSampling, ModelConfig, RlConfig, RolloutConfig, SamplingConfig
from unirl.config_loading import load_config
from unirl.jobs import bench
from unirl.jobs.assets import resolve_checkpoint
from unirl.lab.lumina_dimoo_student import make_student

ROOT = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    make_student(0).write(folder)
    return folder


def settings(checkpoint, guidance):
    image = ImageSampling(guidance_scale=guidance, diffusion_steps=STEPS)
    rollout = RolloutConfig(backend="torch", sampling=SamplingConfig(image=image))
    return RlConfig(model=ModelConfig(family="lumina_dimoo", path=str(checkpoint)), rollout=rollout)


def test_a_family_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"expected a masked-diffusion family; got model.family janus_pro; give .* -c"):
        measure_sampling(RlConfig(), resolve_checkpoint("lab:janus"))


def test_an_update_costs_what_its_passes_cost(checkpoint):
    arms = [Arm(name="all"), Arm(name="two", num_steps=2), Arm(name="three as one", shrink=3)]
    costs = measure_updates(settings(checkpoint, 1.0), checkpoint, arms, num_images=2, rounds=1)
    # A forward and a backward pass of one canvas are three forward-equivalents.
    assert [cost.forward_equivalents for cost in costs] == pytest.approx([3 * STEPS, 3 * 2, 3 * 2])
    assert costs[0].ratio == 1.0
    assert all(cost.seconds > 0 for cost in costs)


def test_guidance_doubles_the_passes_but_for_the_shorter_null_canvas(checkpoint):
    (cost,) = measure_updates(settings(checkpoint, 2.0), checkpoint, [Arm(name="all")], num_images=2, rounds=1)
    assert 3 * STEPS * 1.5 < cost.forward_equivalents < 3 * STEPS * 2


def test_ways_of_sampling_are_compared_with_one_by_one(checkpoint):
    speeds = measure_sampling(settings(checkpoint, 1.5), checkpoint, num_images=3, rounds=1)
    assert [speed.name for speed in speeds] == ["one by one", "3 together", "3 together, approximate cache"]
    assert speeds[0].ratio == 1.0


@pytest.mark.slow
def test_the_command_prints_every_arm_and_json(checkpoint, capfd, monkeypatch):
    config = load_config(
        [ROOT / "configs" / "rl" / "lab_lumina_dimoo.yaml"],
        [
            f"model.path={checkpoint}",
            "evaluation.num_prompts=4",
            "evaluation.greedy=false",
            "rollout.pairs_per_step=2",
            "rollout.num_understanding=2",
            "rollout.num_generation=2",
            "rollout.sampling.image.diffusion_steps=4",
        ],
    )
    monkeypatch.setattr(bench, "measure_updates", lambda *a, **k: measure_updates(*a, num_images=2, rounds=1, **k))
    monkeypatch.setattr(bench, "measure_sampling", lambda *a, **k: measure_sampling(*a, num_images=2, rounds=1, **k))
    assert bench.diffusion(config, budget_s=0.5, as_json=True) == 0
    result = json.loads(capfd.readouterr().out)
    arms = ["all 4 steps", "2 of 4 steps", "1 of 4 steps", "shrink 4 (biased)"]
    assert [row["arm"] for row in result["updates"]] == arms
    assert [row["arm"] for row in result["learning"]] == ["before", *arms]
    assert [row["steps"] > 0 for row in result["learning"]] == [False, True, True, True, True]
    assert all(0 <= row[task] <= 1 for row in result["learning"] for task in ("understanding", "generation"))
    assert bench.diffusion(replace(config), budget_s=0, as_json=False) == 0
    printed = capfd.readouterr().out
    assert all(arm in printed for arm in arms)


def test_a_shape_of_any_size_is_measured(capfd):
    small = Shape(width=64, layers=1, heads=2, inner=64, side=96, steps=4, update_steps=2, dtype="float32")
    assert bench.shape(small, as_json=True) == 0
    spent = json.loads(capfd.readouterr().out)["spent"]
    assert [row["part"] for row in spent] == ["weights", "sampling 96 x 96 in 4 steps", "update on 2 of 4 steps"]
    assert np.all([row["seconds"] > 0 for row in spent])
