"""Sentinels of fine-tuning on made lines; planted faults are in tests/faults."""

import numpy as np
import pytest

from unirl.config import SftConfig
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.sentinel_table import SENTINELS, refusing_sentinel
from unirl.monitoring.sentinels import Sentinels, StoppedByAlertError
from unirl.monitoring.step_data import StepData


def line(step, **changes):
    """A healthy step of 16 sequences, with some metrics changed, or left out where they are None."""
    noise = np.random.default_rng(step).uniform(0.8, 1.2, 4)
    values = {
        "learner/lr": 1e-4, "learner/grad_norm": 2.0 * noise[0], "learner/num_rows": 16.0, "learner/update_s": 4.0,
        "sft/nats/text": (1.0 + 2 / step) * noise[1], "sft/nats/image": 4.0 * noise[2],
        "sft/num_targets/text": 500.0, "sft/num_targets/image": 4000.0,
        "sft/num_learned/text": 16.0, "sft/num_learned/image": 10.0, "sft/num_lost_targets": 0.0,
        "sft/grad_norm/text": 0.01 * noise[3], "sft/grad_norm/image": 0.03, "sft/moved_fraction": 0.9,
        "sft/repeated_fraction": 0.0, "sft/num_leaked": 0.0, "sft/data_wait_s": 0.01,
    } | {f"sft/{name.replace('__', '/')}": value for name, value in changes.items()}  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}


def heard(lines):
    """(step, sentinel) of each alert."""
    watch, found = Sentinels(None), []
    for step, values in enumerate(lines, start=1):
        begun, _ = watch.look(StepData(step=step, groups=(), learner=values), values)
        found += [(step, alert.sentinel.name) for alert in begun]
    return found


def from_third(steps=4, **changes):
    return [line(step, **(changes if step >= 3 else {})) for step in range(1, steps + 1)]


def test_healthy_steps_are_left_alone():
    assert heard(line(step) for step in range(1, 80)) == []


@pytest.mark.parametrize(
    ("sentinel", "caught", "changes"),
    [
        ("nonfinite", 3, {"nats__image": float("nan")}),
        ("no_gradient", 3, {"grad_norm__text": 0.0}),
        ("no_gradient", 3, {"grad_norm__image": None}),
        ("no_gradient", 5, {"num_targets__image": 0.0, "num_learned__image": 0.0, "grad_norm__image": None}),
        ("lost_rows", 3, {"num_lost_targets": 40.0}),
        ("lost_rows", 3, {"num_lost_targets": -40.0}),
        ("frozen_weights", 5, {"moved_fraction": 0.0}),
        ("dominating_modality", 4, {"grad_norm__image": 5.0}),
        ("loss_spike", 4, {"nats__text": 9.0}),
        ("flat_loss", 5, {"nats__image": 4.123456}),
        ("repeated_conversations", 3, {"repeated_fraction": 0.5}),
        ("evaluation_leak", 3, {"num_leaked": 1.0}),
        ("data_wait", 5, {"data_wait_s": 5.0}),
    ],
)
def test_a_fault_is_told_within_three_steps(sentinel, caught, changes):
    assert heard(from_third(caught + 1, **changes))[:1] == [(caught, sentinel)]


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_norm__text": 1e-6, "num_targets__text": 32.0},  # captions, whose only words are the marks at their ends
        {"grad_norm__text": 1e-6, "nats__text": 0.05},  # words that are known
        {"data_wait_s": 0.4, "moved_fraction": 0.01},
        {"repeated_fraction": 0.05},
    ],
)
def test_what_is_no_fault_is_left_alone(changes):
    steps = [values | {"learner/update_s": 0.1} for values in from_third(**changes)]
    assert [name for _, name in heard(steps) if name != "flat_loss"] == []


def test_weights_may_stand_where_the_schedule_ends():
    ending = [line(step, moved_fraction=0.0) | {"learner/lr": 1e-4 / step**2} for step in range(4, 12)]
    assert heard([*map(line, range(1, 4)), *ending]) == []


def test_a_loss_far_off_in_one_step_is_noise():
    steps = [line(step, **({"nats__text": 9.0} if step in (5, 7) else {})) for step in range(1, 9)]
    assert heard(steps) == []


def test_a_modality_that_is_rare_may_be_absent():
    def rare(step, every):
        there = float(step % every == 1)
        return line(step, num_targets__image=40 * there, num_learned__image=there, grad_norm__image=there or None)

    assert heard(rare(step, 10) for step in range(1, 200)) == []
    words = line(1, num_targets__image=0.0, num_learned__image=0.0, grad_norm__image=None, nats__image=None)
    assert heard(words | line(step, num_targets__image=0.0, num_learned__image=0.0, grad_norm__image=None)
                 for step in range(1, 60)) == []  # fmt: skip


def test_a_rare_modality_that_is_gone_is_missed_in_time():
    steps = [line(step, num_learned__image=1.0) for step in range(1, 30)]
    gone = line(1, num_targets__image=0.0, num_learned__image=0.0, grad_norm__image=None)
    missed = [gone | {name: value for name, value in line(step).items() if "nats" in name} for step in range(30, 60)]
    assert heard([*steps, *missed]) == [(50, "no_gradient")]


@pytest.mark.parametrize(
    ("words", "sentinel"),
    [
        ("learner, step 3: expected a gradient from each modality; got no gradient of image in a", "no_gradient"),
        ("learner, step 3: expected a gradient; got none at all; check", "no_gradient"),
        ("learner, step 3: expected a finite loss and gradient; got NaN", "nonfinite"),
    ],
)
def test_a_refusal_is_that_of_its_sentinel(words, sentinel):
    assert refusing_sentinel(RuntimeError(words)).name == sentinel


def test_an_alert_is_an_event_which_a_resumed_run_goes_on_with(tmp_path):
    config = SftConfig()

    def go_on(steps, *, resume):
        with RunLog(tmp_path, config, config.monitoring, resume=resume) as log:
            log.accept()
            for step in steps:
                log.record_sft_step(step, line(step, grad_norm__text=0.0 if 3 <= step < 6 else 0.01))

    go_on([1, 2, 3, 4], resume=False)
    go_on([5, 6, 7, 8], resume=True)
    events = [event for event in read_lines(tmp_path / "events.jsonl") if "sentinel" in event]
    assert [(e["kind"], e["step"], e["attempt"]) for e in events] == [
        ("alert", 3, 0), ("alert", 5, 1), ("alert over", 8, 1),
    ]  # fmt: skip
    assert [e["since"] for e in events if e["kind"] == "alert"] == [3, 3]
    assert {(e["sentinel"], e.get("severity", "warn")) for e in events} == {("no_gradient", "warn")}


def test_what_is_to_end_the_run_names_the_command_that_goes_on(tmp_path):
    config = SftConfig()
    with RunLog(tmp_path, config, config.monitoring, facts={"job": "sft"}) as log:
        log.check_alerts()
        log.stopping = "no_gradient: text has none;"
        with pytest.raises(StoppedByAlertError, match=f"unirl sft --resume {tmp_path}"):
            log.check_alerts()


def test_the_table_says_of_each_sentinel_what_it_looks_at():
    assert all(s.watches or s.sft for s in SENTINELS)
    assert all(bool(s.find) <= bool(s.watches) and bool(s.find_sft) <= bool(s.sft) for s in SENTINELS)
    elsewhere = {s.name for s in SENTINELS if s.sft and s.find_sft is None}
    assert elsewhere == {"left_out", "rate_jump", "stalled", "unlearned_modality"}
