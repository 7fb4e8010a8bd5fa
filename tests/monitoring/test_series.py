import json
import math
import re

import pytest

from tests.cluster.exporting import PHASES, learner_metrics
from tests.monitoring.made_run import make_step
from unirl.monitoring.metrics import METRICS, step_metrics
from unirl.monitoring.series import BY_NAME, SERIES, FleetSamples, alert_sample, step_samples
from unirl.run_files import last_beats


@pytest.fixture(scope="module")
def values():
    return step_metrics(make_step(3, learner=learner_metrics(3), unjudged=(2,))) | {
        f"phase/{phase}_s": seconds for phase, seconds in PHASES.items()
    }


@pytest.fixture(scope="module")
def samples(values):
    return list(step_samples(3, values, 1000.0))


def test_samples_fit_their_series(samples):
    for sample in samples:
        assert tuple(sample.labels) == BY_NAME[sample.name].labels
    keys = [(sample.name, *sample.labels.values()) for sample in samples]
    assert len(set(keys)) == len(keys)


def test_values_and_labels_are_those_of_the_metrics(samples, values):
    found = {(sample.name, *sample.labels.values()): sample.value for sample in samples}
    assert found["unirl_step",] == 3
    assert found["unirl_step_time_seconds",] == 1000.0
    assert found["unirl_reward_mean", "understanding", "all"] == values["reward/understanding"]
    assert found["unirl_reward_mean", "generation", "aligned"] == values["reward/generation/aligned"]
    assert found["unirl_score_mean", "generation", "lab_verifier", "exact"] == values[
        "score/generation/lab_verifier/exact"
    ]  # fmt: skip
    assert found["unirl_learner_grad_norm", "all"] == values["learner/grad_norm"]
    assert found["unirl_learner_grad_norm", "generation"] == 0.25
    assert found["unirl_policy_ratio", "max"] == values["policy/ratio_max"]
    assert found["unirl_step_phase_seconds_total", "backward"] == 0.4
    assert found["unirl_rollout_samples_total", "image"] == 32
    assert found["unirl_reward_unjudged_fraction", "generation"] == pytest.approx(1 / 8)


def test_labels_hold_no_pair_prompt_or_step(samples):
    for sample in samples:
        assert all(re.fullmatch(r"[a-z_]+", value) for value in sample.labels.values()), sample


def test_what_is_not_finite_ends_its_gauge_and_is_counted():
    samples = {
        sample.name: sample.value
        for sample in step_samples(1, {"policy/kl": math.inf, "time/step_s": math.nan, "learner/lr": 1.0}, 0.0)
    }
    assert samples["unirl_nonfinite_metrics"] == 2
    assert math.isnan(samples["unirl_policy_kl"])
    assert samples["unirl_learner_lr"] == 1.0
    assert "unirl_step_seconds" not in samples


@pytest.mark.parametrize("series", [s for s in SERIES if s.source], ids=lambda series: series.name)
def test_every_source_is_a_metric_of_the_table(series):
    examples = {"<task>": "understanding", "<kind>": "aligned", "<modality>": "image", "<phase>": "rollout"}
    names = [re.sub(r"<\w+>", lambda found: examples.get(found[0], "word"), metric.name) for metric in METRICS]
    assert any(re.fullmatch(series.source, name) for name in names), series.source


def test_names_are_prometheus_own_way():
    for series in SERIES:
        assert re.fullmatch(r"unirl_[a-z_]+", series.name)
        assert series.name.endswith("_total") == (series.kind == "counter")


def test_an_alert_is_counted_by_who_raised_it():
    assert alert_sample({"sentinel": "kl", "severity": "stop", "step": 9}).labels == {
        "sentinel": "kl",
        "severity": "stop",
    }
    assert alert_sample({}).labels == {"sentinel": "other", "severity": "warn"}


def beat(actor, time, **fields):
    return {"time": time, "actor": actor, "role": "rollout.text", "queue": 2, "memory_mb": 1.0} | fields


def sampled(fleet, beats, now):
    return {(s.name, s.labels["actor"]): s.value for s in fleet.samples(beats, now)}


def test_heartbeats_become_states_lags_and_growth():
    fleet = FleetSamples(heartbeat_s=5.0)
    beats = [beat("a", 100.0, policy_version=5, num_tokens=40), beat("b", 60.0, policy_version=3, num_tokens=7)]
    first = sampled(fleet, beats, 101.0)
    assert (first["unirl_actor_state", "a"], first["unirl_actor_state", "b"]) == (1, 0)
    assert (first["unirl_weight_version_lag", "a"], first["unirl_weight_version_lag", "b"]) == (0, 2)
    assert first["unirl_actor_tokens_total", "a"] == 40
    assert first["unirl_actor_memory_bytes", "a"] == 1e6
    again = sampled(fleet, [beat("a", 105.0, num_tokens=55), beat("b", 60.0, num_tokens=7)], 106.0)
    assert again["unirl_actor_tokens_total", "a"] == 15
    assert ("unirl_actor_tokens_total", "b") not in again
    # Another process in its place counts from 0.
    assert sampled(fleet, [beat("a", 110.0, num_tokens=9)], 111.0)["unirl_actor_tokens_total", "a"] == 9
    assert math.isnan(sampled(fleet, [beat("a", 110.0)], 800.0)["unirl_actor_state", "a"])


def test_rare_heartbeats_make_no_actor_silent():
    beats = [beat("a", 100.0)]
    states = {
        every_s: [
            sampled(FleetSamples(every_s), beats, 100.0 + age)["unirl_actor_state", "a"] for age in (29, 31, 359, 361)
        ]
        for every_s in (1.0, 5.0, 60.0)
    }
    assert states == {1.0: [1, 0, 0, 0], 5.0: [1, 0, 0, 0], 60.0: [1, 1, 1, 0]}


def test_the_last_whole_heartbeat_of_each_actor_is_read(tmp_path):
    assert last_beats(tmp_path) == []
    folder = tmp_path / "actors"
    folder.mkdir()
    lines = "".join(json.dumps(beat("a", n)) + "\n" for n in range(200))
    (folder / "a.jsonl").write_text(lines + '{"torn')
    (folder / "a.1.jsonl").write_text(lines)
    (folder / "b.jsonl").write_text('{"torn')
    (folder / "c.jsonl").write_text("")
    (folder / "d.jsonl").write_text("")  # rotated a moment ago
    (folder / "d.1.jsonl").write_text(json.dumps(beat("d", 7)) + "\n")
    assert [(found["actor"], found["time"]) for found in last_beats(tmp_path)] == [("a", 199), ("d", 7)]
