"""The measurements of fine-tuning at tiny sizes: what they measure, never how fast."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest

from unirl.benchmarks.anole_folder import AnoleSize
from unirl.benchmarks.sft import measure_encoding, measure_steps, measure_waiting
from unirl.benchmarks.sft_data import make_workload, random_samples
from unirl.benchmarks.sft_memory import HeadShape, measure_memory, spend
from unirl.benchmarks.sft_shape import SftShape, measure_sft_shape
from unirl.config import LearnerConfig, SftConfig
from unirl.jobs import bench

pytestmark = pytest.mark.slow

TINY = AnoleSize(hidden=64, layers=1, vocabulary=1200, num_codes=64, codes_per_side=2)
SHAPE = SftShape(
    width=64, layers=2, heads=2, inner=64, vocabulary=8300, length=32, rows_at_once=4, steps=1, dtype="float32"
)


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    learner = LearnerConfig(lr=1e-3, warmup_steps=0, max_tokens_per_micro_batch=1024, zero_stage=0)
    config = SftConfig(learner=learner)
    return make_workload(tmp_path_factory.mktemp("made"), config, None, size=TINY, num_samples=8)


def test_conversations_are_always_the_same_and_mix_text_and_pictures():
    once, again = list(random_samples(20)), list(random_samples(20))
    assert [str(sample.turns) for sample in once] == [str(sample.turns) for sample in again]
    pictures = [sum(len(turn.images) for turn in sample.turns) for sample in once]
    assert {0, 1, 2} <= set(pictures)


def test_every_arm_learns_the_same_loss_and_the_first_is_ours(workload, monkeypatch):
    monkeypatch.setattr("unirl.benchmarks.sft.trainer_is_installed", lambda: False)
    speeds = measure_steps(workload, rounds=1)
    assert [speed.arm for speed in speeds] == ["unirl", "plain loop, packed", "plain loop, padded"]
    assert speeds[0].ratio == 1.0
    assert all(speed.tokens_per_s > 0 and speed.ratio > 0 for speed in speeds)
    assert [speed.loss for speed in speeds] == pytest.approx([speeds[0].loss] * 3, abs=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate")
def test_the_trainer_takes_part(workload):
    speeds = measure_steps(workload, rounds=1)
    assert speeds[-1].arm == "Hugging Face Trainer, padded"
    # More ids compete.
    assert speeds[-1].loss > speeds[0].loss


def test_without_accelerate_the_trainer_is_left_out_and_said_to_be(workload, monkeypatch, caplog):
    monkeypatch.setattr("unirl.benchmarks.sft_baselines.find_spec", lambda _: None)
    assert "plain loop, padded" in [speed.arm for speed in measure_steps(workload, rounds=1)]
    assert "pip install accelerate" in caplog.text


def test_codes_are_made_in_every_way(workload):
    speeds = measure_encoding(workload, rounds=1)
    assert [speed.way for speed in speeds] == ["unirl", "bare network, one by one", "bare network, 8 together"]
    assert all(speed.images_per_s > 0 and speed.ratio > 0 for speed in speeds)


def test_the_wait_for_data_is_a_share(workload):
    wait = measure_waiting(workload, steps=3)
    assert wait.steps == 3
    assert 0 <= wait.share < 1
    assert wait.share == pytest.approx(wait.wait_s / wait.step_s)


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forms_of_the_loss_agree_and_parts_take_less_memory(apart, monkeypatch):
    if not apart:
        monkeypatch.setattr("unirl.benchmarks.sft_memory._in_its_own_process", spend)
    forms = {own.form: own for own in measure_memory(HeadShape(positions=256, vocabulary=50_000, num_codes=10_000))}
    assert forms["sliced"].nats == pytest.approx(forms["masked"].nats, abs=1e-5)
    assert forms["sliced, few at once"].nats == pytest.approx(forms["masked"].nats, abs=1e-5)
    assert forms["sliced, few at once"].peak_mib < forms["full"].peak_mib
    assert forms["full"].ratio == 1.0


def test_a_form_that_fails_says_what_to_lower():
    with pytest.raises(RuntimeError, match=r"loss 'full' to run at -1 positions.*lower --positions"):
        measure_memory(HeadShape(positions=-1))


def test_a_shape_of_any_size_is_measured_and_extrapolated():
    speed = measure_sft_shape(SHAPE)
    assert speed.weights == 2 * (4 * 64 * 64 + 3 * 64 * 64) + 2 * 8300 * 64
    # Six a token and weight of a product, the head's halved, and attention.
    assert speed.model_flops == 32 * (6 * (2 * 7 * 64 * 64 + 64 * 8300 / 2) + 6 * 2 * 32 * 64)
    assert speed.seconds > speed.optimizer_s > 0
    assert speed.extrapolated_s is not None
    assert speed.extrapolated_s > speed.seconds
    assert speed.mfu is None or 0 < speed.mfu < 1


def test_all_layers_need_no_extrapolation():
    assert measure_sft_shape(replace(SHAPE, layers=32, length=8, optimizer=False)).extrapolated_s is None


@pytest.mark.parametrize(("change", "message"), [({"heads": 3}, "--heads"), ({"dtype": "int8"}, "--dtype float32 or")])
def test_a_shape_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=f"bench sft-shape: expected {message}"):
        replace(SHAPE, **change)


def test_the_commands_print_tables_and_json(capfd, monkeypatch):
    monkeypatch.setattr(bench, "HeadShape", lambda **named: HeadShape(vocabulary=2000, num_codes=500, **named))
    monkeypatch.setattr("unirl.benchmarks.sft_memory._in_its_own_process", spend)
    monkeypatch.setattr("unirl.benchmarks.sft.trainer_is_installed", lambda: False)
    size = bench.SftSize(model=TINY, samples=4, rounds=1, positions=8)
    assert bench.sft(SftConfig(), size, as_json=True) == 0
    found = json.loads(capfd.readouterr().out)
    assert set(found) == {"steps", "memory", "encoding", "waiting"}
    assert np.all([row["ratio"] > 0 for row in found["steps"] + found["memory"] + found["encoding"]])
    assert bench.sft(SftConfig(), size, as_json=False) == 0
    printed = capfd.readouterr().out
    assert all(row["arm"] in printed for row in found["steps"])
    assert bench.sft_shape(SHAPE, as_json=True) == 0
    assert json.loads(capfd.readouterr().out)["speed"]["tokens_per_s"] > 0
    assert bench.sft_shape(SHAPE, as_json=False) == 0
    assert "all 32 layers, EXTRAPOLATED" in capfd.readouterr().out
