"""Fine-tuning on conversations against a plain loop of PyTorch on the same tiny Anole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.joint_checkpoints import write_anole
from tests.models.conversations import CASES, config_of, dialogues, pack
from tests.models.theirs import head_rows, rounding, their_model, their_states
from tests.sequences import random_sequences
from unirl.config import LearnerConfig, ModelConfig, SftLossConfig
from unirl.learner.engine import RankPlace
from unirl.learner.sft_learner import SftLearner, SftSettings
from unirl.learner.sft_targets import count_targets, target_mask
from unirl.models import anole
from unirl.models.policy import load_interleaved
from unirl.types import TokenKind

SETTINGS = SftSettings(
    learner=LearnerConfig(lr=1e-3, warmup_steps=0, max_tokens_per_micro_batch=64, zero_stage=0),
    loss=SftLossConfig(),
    batching="packed",
    num_steps=10,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_anole(tmp_path_factory.mktemp("anole") / "tiny")


@pytest.fixture
def load(folder):
    return lambda: anole.load_interleaved(ModelConfig(family="anole"), folder)


@pytest.fixture
def make_learner(load):
    made = []

    def make(*, loss=None, learner=None, batching="packed"):
        settings = replace(
            SETTINGS,
            loss=replace(SETTINGS.loss, **(loss or {})),
            learner=replace(SETTINGS.learner, **(learner or {})),
            batching=batching,
        )
        made.append(SftLearner(load(), settings, RankPlace()))
        return made[-1]

    yield make
    for learner in made[:-1]:
        learner._engine.destroy()
    if made:
        made[-1].close()


@pytest.fixture(scope="module")
def sequences(folder):
    return random_sequences(anole.load_layout(ModelConfig(family="anole"), folder), 12)


def plain_losses(module, sequences, config, vocabulary):
    """Nats of every target by modality: one sequence at a time, full logits, one target at a time."""
    nats = {"text": [], "image": []}
    codes = range(vocabulary.first_code, vocabulary.first_code + vocabulary.num_codes)
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids).long()
        states = module.model(input_ids=ids[None]).last_hidden_state[0]
        logits = functional.linear(states, module.lm_head.weight)
        for place in np.flatnonzero(target_mask(sequence, config)):
            is_code = int(ids[place]) in codes
            rivals = [i for i in range(vocabulary.size) if (i in codes) == is_code]
            row = logits[place - 1]
            nats["image" if is_code else "text"].append(torch.logsumexp(row[rivals], 0) - row[ids[place]])
    return nats


def weights(learner):
    return {name: value.detach().clone() for name, value in learner.policy.module.state_dict().items()}


@pytest.mark.parametrize("reduction", ["tokens", "modalities"])
def test_one_update_equals_a_plain_loop(make_learner, load, sequences, reduction):
    loss = {"reduction": reduction, "text_weight": 0.5, "image_weight": 2.0}
    learner = make_learner(loss=loss, learner={"max_grad_norm": 0.0})
    metrics = learner.update(learner.prepare(sequences), 1)

    policy = load()
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    nats = plain_losses(policy.module, sequences, learner._settings.loss, policy.layout.vocabulary)
    text, image = torch.stack(nats["text"]), torch.stack(nats["image"])
    if reduction == "tokens":
        total = (0.5 * text.sum() + 2.0 * image.sum()) / (len(text) + len(image))
    else:
        total = 0.5 * text.mean() + 2.0 * image.mean()
    total.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.module.parameters()])
    optimizer.step()

    assert metrics["learner/loss"] == pytest.approx(total.item(), abs=1e-6)
    assert metrics["sft/nats/text"] == pytest.approx(text.mean().item(), abs=1e-6)
    assert metrics["sft/nats/image"] == pytest.approx(image.mean().item(), abs=1e-6)
    assert metrics["sft/num_targets/text"] == len(text)
    assert metrics["sft/num_lost_targets"] == 0
    assert learner.num_passes == metrics["learner/num_micro_batches"]
    assert metrics["sft/num_learned/text"] == len(sequences) > metrics["sft/num_learned/image"] > 0
    assert metrics["sft/moved_fraction"] > 0.5
    assert metrics["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    expected = policy.module.state_dict()
    for name, value in weights(learner).items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "change", [{"batching": "bucketed"}, {"budget": 1000}, {"order": True}, {"form": "masked"}, {"at_once": 5}]
)
def test_packing_order_and_form_change_nothing(make_learner, sequences, change):
    reference = make_learner()
    expected = reference.update(reference.prepare(sequences), 1)
    other = make_learner(
        batching=change.get("batching", "packed"),
        learner={"max_tokens_per_micro_batch": change.get("budget", 64)},
        loss={"form": change.get("form", "sliced"), "rows_at_once": change.get("at_once", 1024)},
    )
    found = other.update(other.prepare(sequences[::-1] if "order" in change else sequences), 1)
    for name in ("learner/loss", "sft/nats/text", "sft/nats/image", "sft/accuracy/text", "sft/accuracy/image"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    assert found["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=1e-5)


def test_text_alone_leaves_the_rows_of_codes_alone(make_learner, folder):
    learner = make_learner()
    layout = learner.policy.layout
    before = weights(learner)["lm_head.weight"]
    learner.update(learner.prepare(random_sequences(layout, 6, text_only=True)), 1)
    moved = (weights(learner)["lm_head.weight"] != before).any(dim=1).numpy()
    assert not moved[layout.vocabulary.is_code].any()
    assert moved[~layout.vocabulary.is_code].any()


def test_learning_rate_zero_changes_no_weight(make_learner, sequences):
    learner = make_learner(learner={"lr": 0.0})
    before = weights(learner)
    metrics = learner.update(learner.prepare(sequences), 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())
    assert metrics["sft/moved_fraction"] == 0


@pytest.mark.parametrize("form", ["sliced", "masked"])
def test_gradients_of_each_modality_at_the_states_that_predict(make_learner, load, sequences, form):
    loss = {"form": form, "text_weight": 0.5, "rows_at_once": 5}
    learner = make_learner(loss=loss)
    found = learner.update(learner.prepare(sequences), 1)

    module, squares = load().module, {"text": 0.0, "image": 0.0}
    vocabulary, config = learner.policy.layout.vocabulary, learner._settings.loss
    total = sum(sum(count_targets(sequence, config).values()) for sequence in sequences)
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids).long()
        states = module.model(input_ids=ids[None]).last_hidden_state[0].detach()
        for place in np.flatnonzero(target_mask(sequence, config)):
            is_code = bool(vocabulary.is_code[sequence.ids[place]])
            state = states[place - 1].requires_grad_()
            logits = functional.linear(state, module.lm_head.weight)[torch.from_numpy(vocabulary.is_code) == is_code]
            target = functional.linear(state, module.lm_head.weight)[ids[place]]
            (gradient,) = torch.autograd.grad(torch.logsumexp(logits, 0) - target, state)
            weight = (1.0 if is_code else 0.5) / total
            squares["image" if is_code else "text"] += float((weight * gradient).square().sum())
    for name, square in squares.items():
        assert found[f"sft/grad_norm/{name}"] == pytest.approx(square**0.5, rel=1e-5)


def test_a_modality_that_weighs_nothing_has_no_norm(make_learner, sequences):
    learner = make_learner(loss={"image_weight": 0.0})
    found = learner.update(learner.prepare(sequences), 1)
    assert found["sft/grad_norm/text"] > 0
    assert "sft/grad_norm/image" not in found


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_of_every_family_learn_both_modalities_and_export_the_public_layout(case, ten_steps):
    steps = json.loads((ten_steps / case / "losses.json").read_text())
    assert len(steps) == 10
    for part, share in (("text", 0.6), ("image", 0.9)):
        assert steps[-1][f"sft/nats/{part}"] < share * steps[0][f"sft/nats/{part}"]
    before, after = (load_interleaved(config_of(case), ten_steps / case / name) for name in ("public", "tuned"))
    for part in ("text", "image"):
        (old, rows), (new, _) = head_rows(before, part), head_rows(after, part)
        assert (old[rows] != new[rows]).any(dim=1).float().mean() > 0.5
    theirs, sequences = their_model(case, ten_steps / case / "tuned"), dialogues(after.layout)
    with torch.no_grad():
        states = [after.hidden_states_of(pack([sequence])) for sequence in sequences]
        for found, sequence in zip(states, sequences, strict=True):
            torch.testing.assert_close(found, their_states(theirs, sequence), atol=rounding(case), rtol=1e-6)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_resume_goes_on_bit_for_bit(make_learner, sequences, tmp_path, zero_stage):
    straight = make_learner(learner={"zero_stage": zero_stage})
    for step in range(1, 4):
        straight.update(straight.prepare(sequences[step:]), step)
    first = make_learner(learner={"zero_stage": zero_stage})
    first.update(first.prepare(sequences[1:]), 1)
    first.save(tmp_path, 1, {"step": 1})
    resumed = make_learner(learner={"zero_stage": zero_stage})
    assert resumed.restore(tmp_path) == {"step": 1}
    for step in (2, 3):
        resumed.update(resumed.prepare(sequences[step:]), step)
    assert all(torch.equal(value, weights(straight)[name]) for name, value in weights(resumed).items())


def test_recomputed_activations_change_nothing(make_learner, sequences):
    plain, light = make_learner(), make_learner(learner={"activation_checkpointing": True})
    plain.update(plain.prepare(sequences), 1)
    light.update(light.prepare(sequences), 1)
    for name, value in weights(light).items():
        torch.testing.assert_close(value, weights(plain)[name], atol=1e-7, rtol=0)


def test_which_tokens_are_targets(sequences):
    sequence = next(s for s in sequences if (s.kinds == TokenKind.CODE).sum() >= 8)
    default = target_mask(sequence, SftLossConfig())
    assert (default == sequence.in_loss).all()
    assert not target_mask(sequence, SftLossConfig(end_of_image="ignored"))[sequence.kinds == TokenKind.END].any()
    every = target_mask(sequence, SftLossConfig(targets="all"))
    assert every[1:].all()
    assert not every[0]


def test_nothing_to_learn_is_refused(make_learner, sequences):
    learner = make_learner()
    silent = [replace(s, in_loss=np.zeros_like(s.in_loss)) for s in sequences]
    with pytest.raises(ValueError, match="expected targets in the 12 sequences"):
        learner.update(learner.prepare(silent), 1)


def test_broken_weights_are_refused_before_the_optimizer_moves(make_learner, sequences):
    learner = make_learner()
    with torch.no_grad():
        learner.policy.module.lm_head.weight[30] = float("nan")
    before = weights(learner)
    with pytest.raises(RuntimeError, match=r"step 4: expected a finite loss.*NaN or infinity in text of"):
        learner.update(learner.prepare(sequences), 4)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in weights(learner).items())


def test_weights_of_zero_are_refused(make_learner, sequences):
    learner = make_learner(loss={"text_weight": 0.0, "image_weight": 0.0})
    with pytest.raises(RuntimeError, match="none at all"):
        learner.update(learner.prepare(sequences), 1)
