"""Arms compared over seeds and items, and the page about it."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from unirl.evaluation.ablation import WHOLE, Arm, common_measures, compare, mean_of, measures_of, training_rewards
from unirl.evaluation.ablation_report import Ablation, Curve, write_ablation_report
from unirl.evaluation.evaluate import EvaluationItem
from unirl.evaluation.intervals import crossed_gain, crossed_interval, seed_noise

SIZES = {"riddles/right": 30, "pictures/exact": 20}


def arm(name, chance, seeds=(0, 1, 2)):
    """Right and wrong by a coin, the same coin for a seed and an item in every arm."""

    def measures(seed):
        coins = {metric: np.random.default_rng([seed, size]).uniform(size=size) for metric, size in SIZES.items()}
        return {
            metric: {f"i{k}": float(coin < chance) for k, coin in enumerate(values)} for metric, values in coins.items()
        }

    return Arm(name=name, by_seed={seed: measures(seed) for seed in seeds})


def rows_of(arm):
    """[S, N] by a plain loop, in the order of group and item."""
    return np.array(
        [
            [run[metric][item] for metric in sorted(SIZES) for item in sorted(run[metric])]
            for run in arm.by_seed.values()
        ]
    )


def test_several_measures_of_an_item_are_one_value():
    measured = {"riddles/right": {"a": 1.0, "b": 0.0}, "riddles/short": {"a": 0.0, "b": 0.0}}
    cells = compare([Arm(name="x", by_seed={0: measured})], list(measured), "x")
    assert cells["x"].num_items == 2
    assert cells["x"].mean[0] == 0.25


def test_a_measure_that_judged_nothing_is_left_out():
    arms = [Arm(name=name, by_seed={0: {"riddles/right": {"a": 1.0}, "riddles/odd": {}}}) for name in "xy"]
    assert common_measures(arms) == ["riddles/right"]


def test_nothing_is_certain_where_nothing_is_known_of_the_noise():
    arms = [Arm(name=n, by_seed={0: {"heldout/nats": {WHOLE: x}}}) for n, x in (("a", 2.0), ("b", 1.0))]
    assert compare(arms, ["heldout/nats"], "a")["b"].gain == (-1, -1, -1)
    assert not compare(arms, ["heldout/nats"], "a")["b"].is_certain


def test_means_and_gains_equal_a_plain_loop():
    both, alone = arm("both", 0.8), arm("alone", 0.3, seeds=(5, 6))
    cells = compare([both, alone], list(SIZES), "alone")
    noise = seed_noise([rows_of(both), rows_of(alone)])
    assert cells["both"].mean == pytest.approx((np.mean(rows_of(both)), *crossed_interval(rows_of(both), noise=noise)))
    gain = np.mean(rows_of(both)) - np.mean(rows_of(alone))
    assert cells["both"].gain == pytest.approx((gain, *crossed_gain(rows_of(both), rows_of(alone), noise=noise)))
    assert cells["both"].is_certain
    assert (cells["both"].num_seeds, cells["both"].num_items) == (3, 50)
    assert cells["alone"].gain is None
    assert cells["alone"].num_seeds == 2
    assert mean_of(both.by_seed[1], ["riddles/right"]) == np.mean(list(both.by_seed[1]["riddles/right"].values()))


def test_arms_that_agree_on_every_item_differ_by_little_rather_than_by_nothing():
    cells = compare([arm("one", 0.5, seeds=(0,)), arm("same", 0.5, seeds=(0,))], ["riddles/right"], "one")
    mean, low, high = cells["same"].gain
    # 0 of 30: t^2 / n / (1 + t^2 / n) with t = 2.0452.
    assert (mean, high) == pytest.approx((0.0, 0.12236), abs=1e-4)
    assert low == -high
    assert not cells["same"].is_certain


def test_losses_have_no_bounds():
    arms = [Arm(name=n, by_seed={s: {"heldout/nats": {WHOLE: x + s}} for s in (0, 1)}) for n, x in (("a", 2), ("b", 1))]
    cells = compare(arms, ["heldout/nats"], "a")
    assert cells["a"].mean == pytest.approx((2.5, 2.5 - 4.3027 * 0.5, 2.5 + 4.3027 * 0.5), abs=1e-4)
    # Both vary by 0.5 between two seeds: 1 -+ 4.3027 * sqrt(0.5 / 2 + 0.5 / 2).
    assert cells["b"].gain == pytest.approx((-1, -4.04247, 2.04247), abs=1e-4)


def test_a_measure_that_a_run_lacks_is_not_compared():
    whole, part = arm("whole", 0.5), arm("part", 0.5)
    del part.by_seed[2]["riddles/right"]["i7"]
    assert common_measures([whole, part]) == ["pictures/exact"]
    with pytest.raises(ValueError, match=r"got riddles/right; there are pictures/exact"):
        compare([whole, part], list(SIZES), "whole")


def test_measures_are_read_from_what_runs_leave(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for step, right in ((0, 0.0), (9, 1.0)):
        exam = {"items": [{"id": "a", "subset": "riddles", "scores": {"right": right, "unclear": None}}]}
        (folder / f"exam_{step:06d}.json").write_text(json.dumps(exam))
        (folder / f"heldout_{step:06d}.json").write_text(json.dumps({"sft/nats/text": 3 - right}))
        item = EvaluationItem(
            task="generation", mode="greedy", id="p1", category="colors", prompt="draw", choices=(), gold="",
            prompt_image=None, text=None, image="x", finish_reason="stop", reward=right,
            parts={"exact": right, "style": None},
        )  # fmt: skip
        (folder / f"step_{step:06d}.json").write_text(json.dumps({"items": [asdict(item)]}))
    assert measures_of(tmp_path) == {
        "riddles/right": {"a": 1.0},
        "riddles/unclear": {},
        "heldout/nats/text": {WHOLE: 2.0},
        "generation/greedy/reward": {"p1": 1.0},
        "generation/greedy/exact": {"p1": 1.0},
    }
    assert measures_of(tmp_path, first=True)["riddles/right"] == {"a": 0.0}
    assert measures_of(tmp_path / "nowhere") == {}


def test_training_rewards_are_means_over_the_steps_that_all_runs_made(tmp_path):
    rewards = {"a": (0.25, 0.5, 1.0), "b": (0.75, 1.0)}
    for name, values in rewards.items():
        (tmp_path / name / "evaluations").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
        lines = [json.dumps({"step": step, "reward/generation": value}) for step, value in enumerate(values, start=1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = training_rewards({"both": [tmp_path / "a", tmp_path / "b"], "alone": [tmp_path / "a"]})
    assert found == {"generation": {"both": [(1.0, 0.5), (2.0, 0.75)], "alone": [(1.0, 0.25), (2.0, 0.5), (3.0, 1.0)]}}


def test_the_page_shows_arms_scores_and_curves(tmp_path):
    arms = [arm("both <b>", 0.8), arm("alone", 0.3)]
    scores = {"right": compare(arms, ["riddles/right"], "alone")}
    ablation = Ablation(
        name="a & b", arms=[a.name for a in arms], reference="alone", scores=scores,
        measures={m: compare(arms, [m], "alone") for m in SIZES}, before={"right": 0.125},
        curves=[Curve(title="More helps", x_label="samples", points=[(0, (0.3, 0.2, 0.4)), (5, (0.8, 0.7, 0.9))])],
        training={"generation": {"both <b>": [(1.0, 0.5), (2.0, 0.75)]}}, notes=["6 runs"],
    )  # fmt: skip
    page = write_ablation_report(tmp_path, ablation).read_text()
    assert "both &lt;b&gt;" in page
    assert "both <b>" not in page
    assert "<td>0.125</td>" in page
    assert page.count("<td class=sure>") == 3, "the score, and each measure"
    assert "<svg" in page
    assert "over samples" in page
    assert "means over runs and up to 5 steps" in page
    assert json.loads(json.dumps(ablation.as_json()))["scores"]["right"]["alone"]["gain"] is None
