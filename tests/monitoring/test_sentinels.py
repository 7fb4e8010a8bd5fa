from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.monitoring.made_run import make_config, make_step
from unirl.config_loading import load_config
from unirl.monitoring import metrics, sentinels
from unirl.monitoring.detectors import Rules
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.metrics import step_metrics
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.sentinel_table import SENTINELS, refusing_sentinel, severity_of
from unirl.monitoring.sentinels import Sentinels, StoppedByAlertError
from unirl.monitoring.step_data import SyncCheck
from unirl.types import QuarantinedRequest

PACKAGE = Path(metrics.__file__).parents[1]
RULES = Rules.of(make_config())
LOST = QuarantinedRequest(
    request_id="p/understanding", pair_id="p", task="understanding", num_completions=8, attempts=3, error="OSError"
)


@cache
def healthy(step):
    data = make_step(step)
    return data, step_metrics(data)


def changed(step, **values):
    """A step as it should be, with other values of some metrics, among what the learner said too."""
    data, line = healthy(step)
    values = {name.replace("__", "/"): value for name, value in values.items()}
    learner = dict(data.learner) | {name: value for name, value in values.items() if name in data.learner}
    return replace(data, learner=learner), line | values


def heard(steps, rules=RULES):
    watch = Sentinels(rules)
    return [alert.sentinel.name for data, line in steps for alert in watch.look(data, line)[0]]


def regrouped(data, task, change):
    groups = tuple(change(g) if g.scored.group.request.task == task else g for g in data.groups)
    return replace(data, groups=groups)


def with_rewards(group, rewards):
    rewards = np.asarray(rewards, np.float32)
    components = {name: replace(scores, values=rewards) for name, scores in group.scored.components.items()}
    zero = np.zeros_like(group.advantages)
    return replace(group, scored=replace(group.scored, rewards=rewards, components=components), advantages=zero)


def flat(step, value):
    data = make_step(step)
    data = regrouped(data, "generation", lambda g: with_rewards(g, np.full(8, value(g))))
    learned = sum(np.count_nonzero(g.advantages) for g in data.groups)
    data = replace(data, learner=dict(data.learner) | {"learner/num_rows": learned})
    return data, step_metrics(data)


def test_healthy_steps_are_left_alone():
    assert heard(map(healthy, range(1, 40))) == []


SINGLE = {
    "nonfinite": {"learner__loss": float("inf")},
    "disordered_advantages": {"advantage__disordered_fraction": 0.1},
    "learning_rate_zero": {"learner__lr": 0.0},
    "logprob_gap": {"policy__logprob_gap_max__text": 0.0015},
    "off_policy_ratio": {"policy__ratio_min": 0.9},
    "far_kl": {"policy__kl_update": 0.7},
    "unjudged": {"reward__generation__unjudged_fraction": 0.1},
    "blank_images": {"pairs__num_blank_images": 1},
    "equal_images": {"rollout__equal_images_fraction": 1.0},
    "staleness": {"rollout__staleness_max": 1},
    "importance_capped": {"policy__importance_capped_fraction": 0.3},
    "lost_workers": {"learner__num_restarts": 1},
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_sentinel_speaks_at_once(name):
    assert heard([healthy(1), changed(2, **SINGLE[name])]) == [name]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("gradient_spike", {"learner__grad_norm": 20.0}),
        ("entropy_collapse", {"policy__entropy__image": 0.01}),
    ],
)
def test_what_is_unusual_is_known_after_two_steps(name, values):
    assert heard([changed(1, **values), changed(2, **values)]) == []
    assert heard([healthy(1), healthy(2), changed(3, **values)]) == [name]


BFLOAT16 = Rules.of(load_config([], ["model.dtype=bfloat16", "rollout.sampling.image.guidance_scale=5"]))
ROUNDED = {
    "policy__logprob_gap_max__text": 0.04,
    "policy__logprob_gap_max__image": 1.3,
    "policy__logprob_gap__text": 0.001,
    "policy__logprob_gap__image": 0.012,
    "policy__ratio_min": 0.27,
    "policy__ratio_mean": 0.998,
    "policy__ratio_max": 1.8,
}
"""As the lab's sampler on vLLM shows in bfloat16 at guidance 5."""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logprob_gap", {"policy__logprob_gap__text": 0.03}),
        ("logprob_gap", {"policy__logprob_gap__image": 0.3}),
        ("logprob_gap", {"policy__logprob_gap_max__text": 1.3}),
        ("off_policy_ratio", {"policy__ratio_mean": 1.07}),
    ],
)
def test_in_bfloat16_single_tokens_may_differ_and_the_mean_may_not(name, values):
    """Means are believed after two steps: few tokens may have learned in one."""
    rounded = [changed(step, **ROUNDED) for step in range(1, 4)]
    assert heard(rounded, BFLOAT16) == []
    assert heard([*rounded, changed(4, **ROUNDED | values), changed(5, **ROUNDED | values)], BFLOAT16) == [name]
    if "gap_max" not in next(iter(values)):
        assert heard([*rounded, changed(4, **ROUNDED | values), changed(5, **ROUNDED)], BFLOAT16) == []


def test_guidance_spreads_gaps_of_images_alone():
    image = ROUNDED | {"policy__logprob_gap_max__image": 8.0, "policy__logprob_gap__image": 0.17}
    assert heard([changed(1, **image), changed(2, **image)], BFLOAT16) == []


def test_a_reward_that_falls_and_stays_down():
    """0.6 with a spread of 0.3 over 8 pairs: two steps vary by 0.3 sqrt((1/3 + 1/2) / 8) = 0.097 by chance.

    They also have to lose a quarter of the range, 1.
    """
    rules = replace(RULES, pairs_per_step=8)

    def steps(*rewards):
        values = {"reward__understanding__spread": 0.3, "reward__understanding__range": 1.0}
        return [changed(n, **values, reward__understanding=reward) for n, reward in enumerate(rewards, 1)]

    assert heard(steps(0.6, 0.65, 0.55, 0.1), rules) == [], "one step may be hard"
    assert heard(steps(0.6, 0.65, 0.55, 0.3, 0.2), rules) == [], "0.35 is 3.6 times what chance does"
    assert heard(steps(0.6, 0.65, 0.55, 0.1, 0.1), rules) == ["fallen_reward"], "0.5 is 5.2 times"
    assert heard(steps(0.6, 0.65, 0.55, 0.9, 1.0), rules) == []


def test_answers_are_cut_off_in_two_steps_running():
    line = {"rollout__truncated_fraction": 0.3, "reward__understanding__truncated": 0.0}
    assert heard([changed(1, **line), healthy(2), changed(3, **line)]) == []
    assert heard([changed(1, **line), changed(2, **line)]) == ["truncated_failures"]


def test_one_task_dominates_in_two_steps_running():
    line = {"learner__grad_norm__understanding": 0.01, "learner__grad_norm__generation": 0.5}
    alike = {"learner__grad_norm__understanding": 0.4, "learner__grad_norm__generation": 0.5}
    assert heard([changed(1, **line), changed(2, **alike), changed(3, **line)]) == []
    assert heard([changed(1, **line), changed(2, **line)]) == ["dominating_modality"]
    unmeasured = healthy(2)
    assert not any("grad_norm/" in name for name in unmeasured[1]), "as of several ranks at ZeRO 0 or 1"
    assert heard([changed(1, **line), unmeasured, changed(3, **line)]) == ["dominating_modality"]


@pytest.mark.parametrize(
    ("name", "value"), [("constant_reward", lambda g: 0.5), ("zero_variance", lambda g: int(g.pair.pair_id[-1]))]
)
def test_twelve_groups_without_a_signal_are_enough(name, value):
    assert heard([flat(1, value), flat(2, value)]) == []
    assert heard([flat(step, value) for step in (1, 2, 3)]) == [name]


def test_a_condition_that_comes_to_the_other_task_is_told_again():
    watch = Sentinels(RULES)
    found = []
    for step in range(1, 10):
        data, line = healthy(step)
        for task, since in (("understanding", 2), ("generation", 4)):
            line = line | {f"reward/{task}/unjudged_fraction": 0.2 if step >= since else 0.0}
        found += [(alert.step, alert.since, alert.message) for alert in watch.look(data, line)[0]]
    one, other = (f"20.0% of the {task} completions could not be judged" for task in ("understanding", "generation"))
    assert found == [(2, 2, one), (4, 2, f"{one}; {other}")]


def test_a_task_whose_rows_never_arrive_and_rows_that_are_lost():
    data, line = healthy(1)
    without = {name: value for name, value in data.learner.items() if name != "learner/loss/generation"}
    assert heard([(replace(data, learner=without), line)]) == ["no_gradient"]
    fewer = dict(data.learner) | {"learner/num_rows": data.learner["learner/num_rows"] - 1}
    assert heard([(replace(data, learner=fewer), line)]) == ["lost_rows"]


def test_weights_that_stay_and_samplers_that_lag():
    steps = [(replace(data, weights_checksum="ab"), line) for data, line in map(healthy, (1, 2))]
    assert heard(steps) == ["frozen_weights"]
    data, line = healthy(1)
    assert heard([(replace(data, sync_check=SyncCheck(("rollout.text 0",), 4)), line)]) == ["stale_sampler"]
    fine = replace(data, sync_check=SyncCheck((), 4))
    assert heard([(fine, step_metrics(fine))]) == []
    assert step_metrics(fine)["rollout/num_compared_weights"] == 4
    assert "rollout/num_compared_weights" not in line, "nobody was asked"


def test_tokens_of_weights_to_come_are_seen_beside_older_ones():
    def drawn(group, version):
        group_of = group.scored.group
        trajectories = tuple(replace(t, policy_version=version) for t in group_of.trajectories)
        return replace(group, scored=replace(group.scored, group=replace(group_of, trajectories=trajectories)))

    data = make_step(6)
    mixed = replace(data, groups=(drawn(data.groups[0], 6), *(drawn(group, 4) for group in data.groups[1:])))
    rules = Rules.of(load_config([], ["overlap.mode=one_step_off", "rollout.pairs_per_step=4"]))
    assert heard([(mixed, step_metrics(mixed))], rules) == ["staleness"]


def test_weights_of_pairs_that_cannot_be():
    data, line = healthy(1)
    groups = tuple(replace(group, pair_weight=1.2) for group in data.groups)
    assert heard([(replace(data, groups=groups), line)]) == ["wrong_pair_weights"]


@pytest.mark.parametrize(("name", "task"), [("length", "understanding"), ("brightness", "generation")])
def test_a_coupling_needs_more_than_chance(name, task):
    metric = f"reward/{task}/{name}_coupling"

    def step(number, value, freedom):
        data, line = healthy(number)
        return data, line | {metric: value, f"{metric}_freedom": freedom}

    assert heard([step(n, 0.95, 7) for n in (1, 2, 3)]) == []
    assert heard([step(n, -0.95, 7) for n in (1, 2, 3, 4)]) == [f"{name}_coupling"]
    assert heard([step(n, 0.6, 50) for n in range(1, 12)]) == []


def test_a_reward_that_is_not_there():
    data, line = healthy(1)
    rules = replace(RULES, rewards=RULES.rewards | {"generation": ("lab_verifier", "hpsv2")})
    assert heard([(data, line)], rules) == ["missing_component"]


def test_a_second_reward_that_says_one_thing():
    def with_second(step):
        data = regrouped(make_step(step), "generation", add_second)
        return data, step_metrics(data)

    def add_second(group):
        components = dict(group.scored.components)
        components["hpsv2"] = replace(components["lab_verifier"], values=np.full(8, 0.3, np.float32), details={})
        return replace(group, scored=replace(group.scored, components=components))

    rules = replace(RULES, rewards=RULES.rewards | {"generation": ("lab_verifier", "hpsv2")})
    assert heard(map(with_second, (1, 2)), rules) == []
    assert heard(map(with_second, (1, 2, 3)), rules) == ["missing_component"]


def test_pairs_come_once_an_epoch():
    def step(number, made_of):
        data = replace(make_step(made_of), step=number, num_pairs=8)
        return data, step_metrics(replace(data, policy_version=made_of - 1))

    steps = [step(1, 1), step(2, 2), step(3, 1), step(4, 2)]
    assert [name for name in heard(steps) if name == "repeated_pairs"] == []
    assert "repeated_pairs" in heard([step(1, 1), step(2, 1)])


def test_training_on_what_is_held_out_is_known_by_content():
    data, line = healthy(1)
    asked = data.groups[0].pair.understanding
    watch = Sentinels(RULES)
    watch.hold_out([replace(asked, id="another name", image=asked.image // 2)])
    assert watch.look(data, line)[0] == []
    watch.hold_out([replace(asked, id="another name")])
    (alert,) = watch.look(data, line)[0]
    assert (alert.sentinel.name, asked.id in alert.message) == ("evaluation_leak", True)


def test_requests_left_out_are_told():
    data, line = changed(1, rollout__num_quarantined=1)
    assert heard([(replace(data, quarantined=[LOST]), line)]) == ["quarantined"]


def test_a_condition_is_told_when_it_begins_rarely_while_it_lasts_and_when_it_is_over(monkeypatch):
    monkeypatch.setattr(sentinels, "REMIND_EVERY", 10)
    watch = Sentinels(RULES)
    told, over = [], []
    for step in range(1, 40):
        bad = 10 <= step < 32
        data, line = changed(step, policy__kl=1.0) if bad and step % 3 else healthy(step)  # not in every third step
        begun, ended = watch.look(data, line)
        told += [(step, alert.since) for alert in begun if alert.sentinel.name == "far_kl"]
        over += [(step, alert.since) for alert in ended if alert.sentinel.name == "far_kl"]
    assert told == [(10, 10), (20, 10), (31, 10)]
    assert over == [(34, 10)]


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def go_on(run_dir, steps, *, resume, on_alert="warn"):
    config = make_config(on_alert=on_alert)
    with RunLog(run_dir, config, config.monitoring, resume=resume) as log:
        log.accept()
        for data, _ in steps:
            log.record_step(data)
    return log


def alerts_of(run_dir, kind="alert"):
    events = [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == kind]
    return [(event["attempt"], event["step"], event["sentinel"], event.get("since")) for event in events]


def test_a_resumed_run_knows_what_it_had_seen_and_says_once_more_what_lasts(run_dir):
    steps = [flat(step, lambda g: 0.5) for step in range(1, 7)]
    go_on(run_dir, steps[:2], resume=False)
    assert alerts_of(run_dir) == []
    go_on(run_dir, steps[2:4], resume=True)
    go_on(run_dir, [*steps[4:], *map(healthy, (7, 8, 9))], resume=True)
    assert alerts_of(run_dir) == [(1, 3, "constant_reward", 3), (2, 5, "constant_reward", 3)]
    assert [line[:3] for line in alerts_of(run_dir, "alert over")] == [(2, 9, "constant_reward")]


def test_steps_that_are_made_again_are_not_counted_twice(run_dir):
    config = make_config()
    steps = [replace(make_step(step), num_pairs=40) for step in range(1, 6)]
    go_on(run_dir, [(data, {}) for data in steps], resume=False)
    watch = Sentinels(Rules.of(config), run_dir)
    for data in steps[2:]:
        assert watch.look(data, step_metrics(data)) == ([], [])


def test_an_alert_says_what_to_do_and_by_the_setting_is_to_end_the_run(run_dir):
    data, _ = healthy(1)
    bad = replace(data, learner=dict(data.learner) | {"policy/kl": 0.9, "learner/num_restarts": 1})
    log = go_on(run_dir, [(bad, {})], resume=False, on_alert="stop")
    events = {e["sentinel"]: e for e in read_lines(run_dir / "events.jsonl") if e["kind"] == "alert"}
    assert {name: event["severity"] for name, event in events.items()} == {"far_kl": "stop", "lost_workers": "warn"}
    assert "learner.lr" in events["far_kl"]["remedy"]
    assert log.stopping.startswith("far_kl: during the updates the policy is 0.9 nats")
    log = go_on(run_dir, [(bad, {})], resume=True)
    assert log.stopping == ""


def test_while_something_is_wrong_its_first_step_is_known(run_dir):
    steps = [healthy(step) for step in range(1, 8)]
    bad = [(replace(data, learner=dict(data.learner) | {"policy/kl": 0.9}), {}) for data, _ in steps]
    harmless = (replace(steps[0][0], learner=dict(steps[0][0].learner) | {"learner/num_restarts": 1}), {})
    assert go_on(run_dir, [harmless, steps[1]], resume=False).onsets == []
    assert go_on(run_dir, [bad[2]], resume=True).onsets == [3]
    assert go_on(run_dir, [steps[3], steps[4], steps[5]], resume=True).onsets == [3]
    assert [line[1] for line in alerts_of(run_dir, "alert over") if line[2] == "far_kl"] == [6]
    assert go_on(run_dir, [bad[6]], resume=True).onsets == [3], "what comes again soon began then"


def test_each_time_that_learning_went_wrong_counts():
    watch = Sentinels(RULES)
    for step in range(1, 61):
        data, line = healthy(step)
        far = {"policy/kl": 0.9} if step in (8, 15, 16) else {}
        flat = {"reward/generation/zero_variance_fraction": 1.0} if step > 4 else {}
        watch.look(data, line | far | flat)
    assert watch.onsets == [6, 8], "an early one hides no later one, and one that flaps is one"
    data, line = healthy(90)
    watch.look(data, line | {"policy/kl": 0.9, "reward/generation/zero_variance_fraction": 0.5})
    assert watch.onsets == [6, 8], "within 100 steps of the last it is the same"
    data, line = healthy(300)
    watch.look(data, line | {"policy/kl": 0.9})
    assert watch.onsets == [6, 300]


def test_a_step_that_measures_nothing_is_no_sign_that_a_condition_is_over():
    watch = Sentinels(RULES)
    told = []
    for step in range(1, 61):
        data, line = healthy(step)
        measured = {"policy/kl_update": 0.9 if step < 40 else 0.01} if step % 10 == 0 else {}
        begun, over = watch.look(data, line | measured)
        told += [(alert.step, "alert") for alert in begun] + [(alert.step, "over") for alert in over]
    assert told == [(10, "alert"), (60, "over")]


def test_a_sentinel_that_fails_forgets_nothing():
    watch = Sentinels(RULES)
    for step in range(1, 10):
        data, line = healthy(step)
        with pytest.MonkeyPatch.context() as patch:
            if step == 5:
                patch.setitem(watch._finders, "far_kl", lambda look: 1 / 0)
            begun, over = watch.look(data, line | ({"policy/kl": 0.9} if step > 2 else {}))
        assert [(alert.step, alert.failed) for alert in begun] == {3: [(3, False)], 5: [(5, True)]}.get(step, [])
        assert [alert.message for alert in over] == (
            ["sentinel far_kl failed no more; it began at step 5"] if step == 8 else []
        )
    assert watch._conditions["far_kl"].since == 3
    assert watch.onsets == [3]


def test_an_error_by_which_a_run_ends_is_an_alert_of_the_sentinel_that_refused(run_dir):
    config = make_config()
    with suppress(RuntimeError), RunLog(run_dir, config, config.monitoring) as log:
        log.record_step(make_step(1))
        raise RuntimeError("learner, step 2: expected finite numbers; got NaN")
    assert [line[1:3] for line in alerts_of(run_dir)] == [(2, "nonfinite")]


def test_no_error_of_another_kind_is_taken_for_a_refusal():
    assert refusing_sentinel(StoppedByAlertError("monitoring.on_alert=stop")) is None
    assert refusing_sentinel(OSError("expected room for 3 more bytes")) is None


def test_every_refusal_is_the_words_of_an_error_in_the_code():
    code = "\n".join(
        " ".join(path.read_text().split()).replace('" "', "").replace('" f"', "")
        for path in PACKAGE.rglob("*.py")
        if path.name != "sentinel_table.py"
    )
    assert [words for sentinel in SENTINELS for words in sentinel.refusals if words not in code] == []


def test_the_table_is_whole():
    names = [sentinel.name for sentinel in SENTINELS]
    assert len(set(names)) == len(names)
    texts = [text for s in SENTINELS for text in (s.watches or s.sft, s.sft or s.watches, s.why, s.remedy)]
    assert all(text.endswith(".") for text in texts)
    elsewhere = {s.name for s in SENTINELS if s.find is s.find_sft is None and not s.refusals}
    assert elsewhere == {"stalled", "other_weights", "left_out", "rate_jump", "unlearned_modality"}
    assert {severity_of(s, "warn") for s in SENTINELS} == {"warn"}


@pytest.mark.parametrize(
    ("settings", "text", "image", "staleness"),
    [
        ((), 1e-3, 2e-3, 0),
        (("model.dtype=bfloat16", "rollout.sampling.image.guidance_scale=5"), 1.0, 9.0, 0),
        (
            ("monitoring.max_logprob_gap=0.25", "overlap.mode=one_step_off", "algorithm.updates_per_step=3"),
            0.25,
            0.5,
            3,
        ),
        (("overlap.mode=bounded_staleness", "overlap.max_staleness=4"), 1e-3, 2e-3, 4),
    ],
)
def test_rules_follow_the_settings(settings, text, image, staleness):
    rules = Rules.of(load_config([], list(settings)))
    assert (rules.logprob_gap, rules.max_staleness) == (pytest.approx({"text": text, "image": image}), staleness)


def test_a_sentinel_that_fails_is_told_once_and_the_run_goes_on(run_dir, monkeypatch, caplog):
    def fail(look):
        if look.data.step < 4:
            raise ZeroDivisionError("no pairs")
        yield "this is wrong"

    table = tuple(replace(s, find=fail) if s.name == "far_kl" else s for s in SENTINELS)
    monkeypatch.setattr(sentinels, "SENTINELS", table)
    steps = [changed(step, learner__lr=0.0) if step == 3 else healthy(step) for step in range(1, 5)]
    log = go_on(run_dir, steps, resume=False, on_alert="stop")
    events = [event for event in read_lines(run_dir / "events.jsonl") if event["kind"] == "alert"]
    assert [(e["step"], e["sentinel"], e["severity"]) for e in events] == [
        (1, "far_kl", "warn"), (3, "learning_rate_zero", "stop"), (4, "far_kl", "stop"),
    ]  # fmt: skip
    assert events[0]["message"] == "sentinel far_kl failed: ZeroDivisionError: no pairs"
    assert "Traceback" in caplog.text
    assert log.stopping.startswith("learning_rate_zero")
    assert len(read_lines(run_dir / "metrics.jsonl")) == len(list((run_dir / "journal").glob("*.parquet"))) == 4


def test_uses_of_pairs_take_the_room_of_the_pair_set_however_long_the_run(run_dir):
    config = make_config(journal=False)
    made = [replace(make_step(1 + step % 2), step=step, num_pairs=8) for step in range(1, 9)]
    with RunLog(run_dir, config, config.monitoring) as log:
        for data in made:
            log.record_step(data)
    assert log.sentinels is not None
    assert len(log.sentinels._uses) == 8
    watch = Sentinels(Rules.of(config), run_dir)

    def repeated(data):
        begun, _ = watch.look(data, step_metrics(data))
        return "repeated_pairs" in [alert.sentinel.name for alert in begun]

    assert not any(repeated(replace(data, policy_version=data.step - 1)) for data in made[3:]), "steps made again"
    assert repeated(replace(made[0], step=9)) is False
    assert repeated(replace(made[0], step=10)) is True


def test_old_lines_are_forgotten(monkeypatch):
    monkeypatch.setattr(sentinels, "KEPT_LINES", 10)
    watch = Sentinels(RULES)
    for step in range(1, 40):
        watch.look(*healthy(step))
    assert sorted(watch._lines) == [1, 2, 3, 4, 5, *range(30, 40)]
