import math
from dataclasses import replace

import numpy as np
import pytest

from tests.monitoring.made_run import make_step
from unirl.monitoring.metrics import step_metrics
from unirl.monitoring.step_checks import is_disordered, ranks


@pytest.fixture(scope="module")
def data():
    return make_step(3, num_pairs=6)


def test_equal_values_share_the_mean_of_their_ranks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.integers(0, 4, 8)
        expected = [np.mean([place for place, v in enumerate(sorted(values)) if v == value]) for value in values]
        assert ranks(values).tolist() == expected


def test_a_reward_is_coupled_to_brightness_inside_groups_alone(data):
    """Pictures of one group are darker by rank, and groups differ in brightness the other way round."""

    def darker(group, place):
        task = group.scored.group.request.task
        if task != "generation":
            return group
        images = [np.full((4, 4, 3), 20 * place + rank, np.uint8) for rank in range(8)]
        trajectories = tuple(
            replace(t, image=image) for t, image in zip(group.scored.group.trajectories, images, strict=True)
        )
        rolled = replace(group.scored.group, trajectories=trajectories)
        rewards = np.arange(8, 0, -1).astype(np.float32) + place
        return replace(group, scored=replace(group.scored, group=rolled, rewards=rewards))

    made = replace(data, groups=tuple(darker(group, place) for place, group in enumerate(data.groups)))
    metrics = step_metrics(made)
    assert metrics["reward/generation/brightness_coupling"] == pytest.approx(-1.0)
    assert metrics["reward/generation/brightness_coupling_freedom"] == 6 * 7
    assert "reward/understanding/length_coupling" not in metrics  # all made answers are of one length


def test_what_is_cut_off_is_measured_by_itself(data):
    cut = [
        float(group.scored.rewards[index])
        for group in data.groups
        for index, trajectory in enumerate(group.scored.group.trajectories)
        if trajectory.finish_reason == "length"
    ]
    metrics = step_metrics(data)
    assert metrics.get("reward/understanding/truncated") == (pytest.approx(np.mean(cut)) if cut else None)


def test_surprisal_is_of_all_tokens_that_count(data):
    drawn = [t for group in data.groups for t in group.scored.group.trajectories if t.modality == "image"]
    expected = -np.mean(np.concatenate([t.logprobs for t in drawn]))
    assert step_metrics(data)["rollout/surprisal/image"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda a: a, False),
        (lambda a: 0.3 * a, False),
        (lambda a: -a, True),
        (lambda a: a + 0.1, True),
        (lambda a: np.roll(a, 1), True),
    ],
)
def test_advantages_rise_with_rewards_and_sum_to_zero(data, change, wrong):
    group = next(g for g in data.groups if len(set(g.scored.rewards.tolist())) > 1)
    assert is_disordered(replace(group, advantages=change(group.advantages))) is wrong


def test_an_unjudged_completion_has_no_advantage():
    group = next(g for g in make_step(3, unjudged=(0, 5)).groups if g.scored.group.request.task == "generation")
    assert not is_disordered(group)
    advantages = group.advantages.copy()
    advantages[[0, 5]] = 0.5, -0.5
    assert is_disordered(replace(group, advantages=advantages))


def test_pictures_of_one_colour_and_drawings_that_are_copies(data):
    assert step_metrics(data)["pairs/num_blank_images"] == 0
    assert step_metrics(data)["rollout/equal_images_fraction"] == 0

    def broken(group):
        request, trajectories = group.scored.group.request, group.scored.group.trajectories
        if request.task == "understanding":
            request = replace(request, sample=replace(request.sample, image=np.full((9, 9, 3), 7, np.uint8)))
        else:
            trajectories = tuple(replace(t, completion_ids=trajectories[0].completion_ids) for t in trajectories)
        rolled = replace(group.scored.group, request=request, trajectories=trajectories)
        return replace(group, scored=replace(group.scored, group=rolled))

    metrics = step_metrics(replace(data, groups=tuple(map(broken, data.groups))))
    assert metrics["pairs/num_blank_images"] == 6
    assert metrics["rollout/equal_images_fraction"] == 1


def test_a_step_without_groups_says_nothing(data):
    metrics = step_metrics(replace(data, groups=()))
    assert "advantage/disordered_fraction" not in metrics
    assert not any(name.startswith("reward/") and "restarts" not in name for name in metrics)
    assert math.isnan(metrics["pairs/similarity_min"])
