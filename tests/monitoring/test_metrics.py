import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.monitoring.made_run import make_step
from unirl.monitoring.metric_advice import ADVICE
from unirl.monitoring.metrics import METRICS, lookup, metrics_page, reduce_values, step_metrics
from unirl.monitoring.step_data import StepData

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def data():
    return make_step(3, num_pairs=6)


def of(data, task, kind=None):
    return [
        group.scored
        for group in data.groups
        if group.scored.group.request.task == task and kind in (None, group.pair.kind)
    ]


def test_rewards_are_means_over_completions_by_task_and_kind(data):
    metrics = step_metrics(data)
    for task in ("understanding", "generation"):
        for suffix, kind in (("", None), ("/aligned", "aligned"), ("/retrieved", "retrieved")):
            rewards = np.concatenate([scored.rewards for scored in of(data, task, kind)])
            assert metrics[f"reward/{task}{suffix}"] == pytest.approx(rewards.mean())
        spreads = [scored.rewards.std(ddof=1) for scored in of(data, task)]
        assert metrics[f"reward/{task}/group_std"] == pytest.approx(np.mean(spreads))
        assert metrics[f"reward/{task}/zero_variance_fraction"] == np.mean([spread == 0 for spread in spreads])
        assert metrics[f"reward/{task}/unjudged_fraction"] == 0


def test_parts_of_the_rewards_pairs_and_speed_are_reported(data):
    metrics = step_metrics(data)
    exact = np.concatenate([s.components["lab_verifier"].details["exact"] for s in of(data, "generation")])
    assert metrics["score/generation/lab_verifier/exact"] == pytest.approx(exact.mean())
    pairs = {group.pair.pair_id: group for group in data.groups}.values()
    assert metrics["pairs/weight_min"] == min(group.pair_weight for group in pairs)
    assert metrics["pairs/similarity_mean"] == pytest.approx(np.mean([group.pair.similarity for group in pairs]))
    assert metrics["rollout/num_tokens"] == 6 * 8 * (12 + 25)
    assert metrics["rollout/images_per_s"] == pytest.approx(48 / data.seconds["rollout"])
    assert metrics["time/step_s"] == pytest.approx(sum(data.seconds.values()))
    assert metrics["policy/kl"] == data.learner["policy/kl"]


def test_unjudged_completions_are_left_out_and_counted():
    data = make_step(3, unjudged=(0, 5))
    metrics = step_metrics(data)
    kept = np.concatenate([scored.rewards[scored.judged] for scored in of(data, "generation")])
    assert metrics["reward/generation"] == pytest.approx(kept.mean())
    assert metrics["reward/generation/unjudged_fraction"] == 0.25


def test_a_step_without_judged_completions_is_nan_never_zero(data):
    group = data.groups[0]
    scored = group.scored
    nothing = np.zeros(len(scored.rewards), bool)
    blind = type(scored)(group=scored.group, rewards=np.zeros_like(scored.rewards), judged=nothing, components={})
    blind_group = type(group)(
        scored=blind, pair=group.pair, pair_weight=1.0, advantages=np.zeros(len(nothing), np.float64)
    )
    metrics = step_metrics(StepData(step=1, groups=(blind_group,)))
    assert math.isnan(metrics["reward/understanding"])


def test_replaced_workers_are_counted(data):
    shaken = step_metrics(replace(data, restarts={"rollout": 0, "reward": 2}))
    assert (shaken["rollout/num_restarts"], shaken["reward/num_restarts"]) == (0, 2)


def test_an_undeclared_name_is_an_error_that_names_it(data):
    with pytest.raises(ValueError, match="got 'policy/klx'"):
        step_metrics(StepData(step=1, groups=data.groups, learner={"policy/klx": 1.0}))


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward/generation/aligned", "reward/<task>/aligned"),
        ("score/generation/hpsv2", "score/<task>/<reward>"),
        ("score/understanding/accuracy/correct", "score/<task>/<reward>/<detail>"),
        ("time/step_s", "time/step_s"),
        ("time/save_s", "time/<phase>_s"),
    ],
)
def test_placeholders_match_any_word(name, declared):
    assert lookup(name).name == declared


@pytest.mark.parametrize("name", ["reward/drawing", "score/generation", "rewardXgeneration", "time/a/b_s"])
def test_placeholders_match_nothing_else(name):
    with pytest.raises(ValueError, match="expected a name declared"):
        lookup(name)


def test_every_metric_says_what_is_normal_and_what_to_do():
    assert ADVICE.keys() == {metric.name for metric in METRICS}
    assert all(metric.advice.normal and metric.advice.otherwise for metric in METRICS)


def test_names_are_unique():
    assert len({metric.name for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learner/loss", 2.0),
        ("learner/num_rows", 6.0),
        ("policy/ratio_max", 3.0),
        ("pairs/weight_min", 1.0),
        ("learner/lr", 2.0),
    ],
)
def test_steps_reduce_as_the_table_says(name, value):
    assert reduce_values(name, [1.0, 3.0, 2.0]) == value


def test_the_page_of_metrics_is_current():
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == metrics_page(), (
        "run: python -m unirl.monitoring.metrics > docs/metrics.md"
    )
