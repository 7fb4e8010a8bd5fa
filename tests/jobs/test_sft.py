"""`unirl sft` as a user starts it: whole runs, killed and resumed; what is wrong with the data or the checkpoint."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import ChameleonForConditionalGeneration

from tests.jobs import runs
from tests.joint_checkpoints import write_anole
from tests.vq_checkpoints import write_chameleon_vq
from unirl.config import LearnerConfig, ModelConfig, SftConfig, SftDataConfig, SftTrainConfig, SourceConfig
from unirl.config_rules import ConfigError
from unirl.data.atomic import DataError
from unirl.data.interleaved import write_interleaved
from unirl.jobs import sft
from unirl.jobs.faults import sft_faults
from unirl.jobs.run_dirs import last_step
from unirl.monitoring.sentinels import StoppedByAlertError
from unirl.types import InterleavedSample, Segment, Turn

WORDS = ("draw", "a", "red", "green", "circle", "square")
STEPS = 12


def conversation(index):
    """A short one, with one picture to be drawn."""
    rng = np.random.default_rng(index)
    asked = " ".join(rng.choice(WORDS, rng.integers(2, 6)))
    picture = rng.integers(0, 255, (10, 10, 3), dtype=np.uint8)
    answer = (Segment(text="here it is :", in_loss=True), Segment(image=picture, in_loss=True))
    turns = Turn(role="user", segments=(Segment(text=asked),)), Turn(role="assistant", segments=answer)
    return InterleavedSample(id=f"c{index}", turns=turns, subset="drawing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_anole(folder / "anole")
    write_chameleon_vq(folder / "vq", size=8, num_codes=16)
    write_interleaved(folder / "talks.jsonl", map(conversation, range(60)))
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return SftConfig(
        model=ModelConfig(family="anole", path=str(folder / "anole"), image_tokenizer=str(folder / "vq")),
        data=SftDataConfig(
            sources={"mine": SourceConfig(path=str(folder / "talks.jsonl"))}, cache_dir=str(tmp_path), max_length=64
        ),
        learner=LearnerConfig(max_tokens_per_micro_batch=256),
        train=SftTrainConfig(run_dir=str(tmp_path / "run"), samples_per_step=16),
    )


def start(folder, run, *more):
    arguments = (
        f"model.path={folder / 'anole'}", "model.family=anole", f"model.image_tokenizer={folder / 'vq'}",
        f"data.sources={{mine: {{path: {folder / 'talks.jsonl'}}}}}", "data.max_length=64", "data.samples_per_shard=16",
        f"evaluation.sources={{held: {{path: {folder / 'talks.jsonl'}, count: 10}}}}", "learner.lr=0.002",
        "learner.max_tokens_per_micro_batch=256", "train.samples_per_step=16", "train.num_epochs=3",
        "train.save_every=3",
    )  # fmt: skip
    return runs.start(folder, run, *arguments, *more, job="sft")


@pytest.fixture(scope="module")
def side_by_side(folder):
    """Run directories of one run that is left alone, and of one that is killed after some steps and resumed."""
    names = ("undisturbed", "killed")
    run_dirs = {name: folder / name for name in names}
    first = {
        name: start(folder, name, "--local", "--run-dir", str(run_dirs[name]), f"data.cache_dir={folder / name}-cache")
        for name in names
    }
    runs.wait_for_step(run_dirs["killed"], 4, first["killed"])
    os.killpg(first["killed"].pid, signal.SIGKILL)
    first["killed"].wait()
    resumed = runs.start(folder, "killed", "--local", "--resume", str(run_dirs["killed"]), job="sft")
    runs.finish(first["undisturbed"], folder, "undisturbed")
    runs.finish(resumed, folder, "killed")
    return run_dirs


@pytest.fixture(scope="module")
def undisturbed(side_by_side):
    return side_by_side["undisturbed"]


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def alerts(run_dir):
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "alert"]


def test_a_healthy_run_has_no_alarm_but_that_it_learns_what_is_held_out(side_by_side):
    for run_dir in side_by_side.values():
        assert {alert["sentinel"] for alert in alerts(run_dir)} == {"evaluation_leak"}
    assert alerts(side_by_side["undisturbed"])[0]["step"] == 1


def test_a_run_learns_and_records_what_it_did(undisturbed):
    steps = metrics(undisturbed)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["sft/nats/text"] < 0.5 * steps[0]["sft/nats/text"]
    assert steps[-1]["sft/nats/image"] < steps[0]["sft/nats/image"]
    before, after = (
        json.loads((undisturbed / "evaluations" / f"heldout_{step:06d}.json").read_text()) for step in (0, STEPS)
    )
    assert after["sft/nats/image"] < before["sft/nats/image"]
    assert after["sft/num_targets/image"] == before["sft/num_targets/image"] == 10 * 16


def test_the_rate_warms_up_over_its_share_and_falls_as_a_cosine(undisturbed):
    rates = [line["learner/lr"] for line in metrics(undisturbed)]
    assert rates[0] == 0.002, "5 % of 12 steps is one step"
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.1 * 0.002


def test_the_export_reloads_in_transformers(folder, undisturbed):
    exported = undisturbed / "policy"
    _, info = ChameleonForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values())
    before, after = (load_file(where / "model.safetensors") for where in (folder / "anole", exported))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= moved
    assert not any("vqmodel" in name for name in moved)


def test_a_killed_run_resumes_to_the_weights_of_the_undisturbed_one(side_by_side, undisturbed):
    run_dir = side_by_side["killed"]
    assert runs.weights_of(run_dir) == runs.weights_of(undisturbed)
    last = {line["step"]: line["learner/loss"] for line in metrics(run_dir)}
    assert last == {line["step"]: line["learner/loss"] for line in metrics(undisturbed)}
    kinds = [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert kinds.count("resume") == 1


@pytest.mark.parametrize("cache", ["undisturbed-cache", pytest.param("made-by-two-encoders", marks=pytest.mark.slow)])
def test_two_ranks_through_ray_learn_the_same(folder, undisturbed, cache):
    run_dir = folder / f"ray-{cache}"
    more = (
        "learner.num_ranks=2", "learner.zero_stage=3", "data.encoders.num_workers=2", "learner.num_cpus=0.5",
        f"data.cache_dir={folder / cache}", "--run-dir", str(run_dir),
    )  # fmt: skip
    runs.finish(start(folder, "ray", *more), folder, "ray")
    for one, two in zip(metrics(undisturbed), metrics(run_dir), strict=True):
        assert two["learner/loss"] == pytest.approx(one["learner/loss"], abs=1e-4)
        for name in ("learner/grad_norm", "sft/grad_norm/text", "sft/grad_norm/image"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), name
        assert two["sft/num_lost_targets"] == two["sft/repeated_fraction"] == 0
        assert two["sft/moved_fraction"] > 0.5
    one, two = (load_file(run / "policy" / "model.safetensors") for run in (undisturbed, run_dir))
    assert all(np.abs(one[name] - two[name]).max() < 1e-3 for name in one)


def test_a_dry_run_looks_for_the_data(config):
    sources = {"mine": SourceConfig(path="stores/nowhere")}
    with pytest.raises(DataError, match="stores/nowhere: expected an existing path"):
        sft.main(replace(config, data=replace(config.data, sources=sources)), dry_run=True)


def test_a_dry_run_shows_the_plan_and_writes_nothing(config, tmp_path, capsys):
    assert sft.main(config, local=True, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "learner" in shown
    assert "train.samples_per_step = 16" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model.family": "emu3"}, ConfigError, r"model.family \(emu3\) must be anole, which .* is of"),
        ({"model.family": "liquid"}, ConfigError, "set model.family=anole"),
        ({"model.image_tokenizer": "anole"}, ValueError, "decoder"),
        ({"data.max_length": 10}, ConfigError, r"data.max_length \(10\) must leave room for one image, .* 18 tokens"),
        ({"data.max_length": 18 + 1}, DataError, r"expected at most 1.00% of 60 samples to be unfit"),
        ({"model.image_pixels": (64, 128)}, ValueError, "image_pixels: expected null"),
        ({"data.sources": {"mine": SourceConfig(path="nowhere")}}, DataError, "nowhere"),
        ({"data.sources": {"mine": SourceConfig(path="talks", subsets=("x",))}}, DataError, "which has drawing; got x"),
        ({"learner.num_ranks": 2}, ConfigError, "must be 1 with --local"),
        ({"evaluation.exam_subsets": ("editing",)}, ConfigError, "must hold only subsets of the exam, not editing"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_one_error(config, folder, change, error, message):
    (key, value), = change.items()  # fmt: skip
    section, name = key.split(".")
    if name == "image_tokenizer":
        value = str(folder / value)
    if name == "sources" and value["mine"].path == "talks":
        value = {"mine": replace(value["mine"], path=str(folder / "talks.jsonl"))}
    changed = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    with pytest.raises(error, match=message):
        sft.main(changed, local=True)
    assert not os.path.exists(config.train.run_dir)


def test_tokens_of_a_changed_checkpoint_are_made_anew(config, folder, tmp_path):
    short = replace(config, train=replace(config.train, max_steps=1, num_epochs=1))
    first = sft.token_sources(short, folder / "anole")
    again = sft.token_sources(short, folder / "anole")
    assert first == again
    strict = replace(short, data=replace(short.data, max_length=29, max_rejected_fraction=0.5))
    sft.token_sources(strict, folder / "anole")
    with pytest.raises(DataError, match=r"expected at most 0.00% of 60 samples to be unfit"):
        sft.token_sources(replace(strict, data=replace(strict.data, max_rejected_fraction=0)), folder / "anole")
    other = replace(short, model=replace(short.model, image_tokenizer=str(tmp_path / "vq2")))
    write_chameleon_vq(tmp_path / "vq2", size=8, num_codes=16, seed=1)
    assert sft.token_sources(other, folder / "anole").training != first.training


def test_a_driver_whose_workers_encode_leaves_the_gpu_alone(config, folder, monkeypatch):
    made = sft.token_sources(config, folder / "anole")
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append(device))
    assert sft.token_sources(config, folder / "anole", lambda units, folder: iter(())) == made
    assert moved == ["cpu"]
    assert sft.token_sources(config, folder / "anole") == made
    assert moved == ["cpu", "cuda"]


def test_a_modality_of_which_nothing_is_learned_is_an_alert_of_the_run(config, tmp_path, capsys):
    loss = replace(config.loss, image_weight=0.0)
    assert sft.main(replace(config, loss=loss, train=replace(config.train, max_steps=1)), local=True) == 0
    (alert,) = alerts(tmp_path / "run")
    assert (alert["sentinel"], alert["severity"]) == ("unlearned_modality", "warn")
    assert alert["message"].startswith("no image will be learned: loss.image_weight is 0")
    assert alert["message"] in capsys.readouterr().err


def test_conversations_that_are_left_out_are_an_alert_of_the_run(config, tmp_path):
    data = replace(config.data, max_length=27, max_rejected_fraction=0.9)
    assert sft.main(replace(config, data=data, train=replace(config.train, max_steps=1)), local=True) == 0
    (alert,) = alerts(tmp_path / "run")
    assert alert["sentinel"] == "left_out"
    assert "of 60 conversations of source mine are left out" in alert["message"]


def test_a_run_that_learns_nothing_says_so(config, tmp_path):
    asleep = replace(
        config,
        learner=replace(config.learner, lr=1e-9),
        evaluation=replace(config.evaluation, sources={"held": replace(config.data.sources["mine"], count=4)}),
        data=replace(config.data, sources={"mine": replace(config.data.sources["mine"], count=50)}),
        train=replace(config.train, num_epochs=5),
    )
    assert sft.main(asleep, local=True) == 0
    assert {alert["sentinel"] for alert in alerts(tmp_path / "run")} == {"evaluation_leak", "flat_loss"}


def test_a_last_evaluation_that_finds_nothing_learned_ends_the_run(config, tmp_path):
    write_interleaved(tmp_path / "held.jsonl", map(conversation, range(100, 104)))
    asleep = replace(
        config,
        learner=replace(config.learner, lr=1e-9),
        evaluation=replace(config.evaluation, sources={"held": SourceConfig(path=str(tmp_path / "held.jsonl"))}),
        monitoring=replace(config.monitoring, on_alert="stop"),
        train=replace(config.train, samples_per_step=2, max_steps=20),
    )
    with pytest.raises(StoppedByAlertError, match="flat_loss: held-out conversations are as likely"):
        sft.main(asleep, local=True)
    assert [alert["step"] for alert in alerts(tmp_path / "run")] == [last_step(tmp_path / "run")] == [20]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "policy").exists()


def test_an_alert_saves_and_ends_the_run_which_then_goes_on(config, tmp_path):
    run_dir = tmp_path / "run"
    strict = replace(
        config,
        monitoring=replace(config.monitoring, on_alert="stop"),
        train=replace(config.train, max_steps=3),
    )
    with sft_faults.words_weigh_nothing(), pytest.raises(StoppedByAlertError, match="unirl sft --resume") as caught:
        sft.main(strict, local=True)
    assert "no_gradient: text has targets and no gradient" in str(caught.value)
    assert last_step(run_dir) == 1
    assert json.loads((run_dir / "run.json").read_text())["status"] == "failed"
    assert sft.main(strict, local=True, resume=str(run_dir)) == 0
    assert [(line["step"], line["attempt"]) for line in metrics(run_dir)] == [(1, 0), (2, 1), (3, 1)]
    assert [(alert["step"], alert["severity"]) for alert in alerts(run_dir)] == [(1, "stop")]


def test_a_signal_amid_the_last_exam_ends_the_run_and_resuming_takes_it(config, tmp_path, monkeypatch, capfd):
    seen, run_dir = [], tmp_path / "run"

    def take_exam(config, checkpoint, save_image):
        seen.append(checkpoint.name)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return {"items": [{"id": str(i), "subset": "s", "scores": {"exact": i % 2}, "prompt": [], "reply": []}
                          for i in range(4)]}  # fmt: skip

    monkeypatch.setattr(sft, "take_exam", take_exam)
    evaluation = replace(config.evaluation, exam="lab", sources=config.data.sources)
    asked = replace(config, evaluation=evaluation, train=replace(config.train, max_steps=2))
    assert sft.main(asked, local=True) == 143
    assert f"saved and ended; go on with: unirl sft --resume {run_dir}" in capfd.readouterr().err
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"
    scored = (run_dir / "evaluations" / "heldout_000002.json").stat().st_mtime_ns
    assert sft.main(asked, local=True, resume=str(run_dir)) == 0
    assert seen == ["anole", "policy", "policy"]
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
    assert (run_dir / "evaluations" / "heldout_000002.json").stat().st_mtime_ns == scored
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
