import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.fakes import TinyPolicy, tiny_batch
from tests.learner.conftest import SETTINGS
from tests.learner.test_learner import SCORING, largest_difference, weights
from unirl.config import LearnerConfig
from unirl.learner import engine
from unirl.learner.engine import RankPlace, deepspeed_config, learning_rate, start_process_group
from unirl.learner.tally import Tally


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_rate_rises_from_the_first_update_and_would_end_at_zero(schedule, wanted):
    config = replace(SETTINGS.learner, lr=1.0, warmup_steps=4, schedule=schedule)
    assert [learning_rate(config, update, 8) for update in range(8)] == pytest.approx(wanted)
    assert learning_rate(config, 8, 8) == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert learning_rate(config, 90, 8) == pytest.approx(1.0 if schedule == "constant" else 0.0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepspeed_never_gets_to_choose_clipping_or_accumulation(zero_stage, dtype):
    settings = deepspeed_config(LearnerConfig(zero_stage=zero_stage, max_grad_norm=0.5), dtype)
    assert settings["managed_gradient_accumulation"] is False
    assert settings["gradient_accumulation_steps"] == 1
    # At stage 0 in float32 the learner clips, since DeepSpeed would not say the norm.
    assert settings["gradient_clipping"] == (0.0 if (zero_stage, dtype) == (0, torch.float32) else 0.5)
    assert settings["bf16"]["enabled"] == (dtype == torch.bfloat16)
    assert settings["zero_optimization"]["stage"] == zero_stage


@pytest.mark.skipif(torch.cuda.is_available(), reason="offloading works where there is a GPU")
def test_offloading_without_a_gpu_says_what_to_set():
    with pytest.raises(ValueError, match=r"without a GPU; got cpu, none; .* set both to none"):
        deepspeed_config(LearnerConfig(offload_optimizer="cpu"), torch.float32)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_clipping_limits_the_step_but_not_the_reported_norm(make_learner, zero_stage):
    norms, results = [], []
    for limit in (0.0, 1e-9):
        learner = make_learner(TinyPolicy(), zero_stage=zero_stage, max_grad_norm=limit)
        before = weights(learner)
        norms.append(learner.update(tiny_batch(TinyPolicy(), SCORING), 0)["learner/grad_norm"])
        results.append(largest_difference(weights(learner), before))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    # A gradient clipped below AdamW's epsilon of 1e-8 moves far less than the rate of 1e-3.
    assert results[0] > 9e-4
    assert results[1] < 1e-4


def test_second_group_of_another_size_is_refused(make_learner):
    make_learner(TinyPolicy())
    with pytest.raises(RuntimeError, match="expected a process group of 2 ranks; this process is already in one of 1"):
        start_process_group(RankPlace(rank=0, world_size=2, port=1))


def test_tally_adds_sums_and_keeps_maxima(make_learner):
    make_learner(TinyPolicy())
    tally = Tally()
    tally.add({"a": torch.tensor(1.5)})
    tally.add({"a": torch.tensor(2), "b": torch.tensor(1e-9)})
    tally.maximum("m", torch.tensor([1.0, 7.0]))
    tally.maximum("m", torch.tensor([-math.inf]))
    tally.maximum("m", torch.tensor([]))
    sums, maxima = tally.reduce()
    assert sums == pytest.approx({"a": 3.5, "b": 1e-9})
    assert maxima == {"m": 7.0}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deepspeed_that_keeps_its_sums_elsewhere_is_refused(make_learner, zero_stage, dtype):
    policy = TinyPolicy()
    policy.module.to(dtype)
    optimizer = make_learner(policy, zero_stage=zero_stage)._engine._engine.optimizer
    settings = replace(SETTINGS.learner, zero_stage=zero_stage)
    kept = next(set(names) for names in engine.PRIVATE_SUMS[zero_stage] if all(hasattr(optimizer, n) for n in names))
    engine.check_private_sums(SimpleNamespace(**dict.fromkeys(kept)), settings)
    for name in kept:
        with pytest.raises(RuntimeError, match=rf"{name}.* without them in deepspeed"):
            engine.check_private_sums(SimpleNamespace(**dict.fromkeys(kept - {name})), settings)
    with pytest.raises(RuntimeError, match="norm_for_param_grads"):
        engine.check_private_sums(SimpleNamespace(**dict.fromkeys(kept)), replace(settings, offload_optimizer="cpu"))
