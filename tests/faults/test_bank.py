"""Faults planted in real runs of the lab: a few of each kind here, the whole bank in the slow tests."""

import pytest

from unirl.config import DataConfig
from unirl.config_rules import ConfigError
from unirl.jobs import verify_faults
from unirl.jobs.faults.bank import CLEAN, FAULTS
from unirl.jobs.faults.lab_run import run_clean, run_fault
from unirl.monitoring.sentinel_table import SENTINELS

QUICK = (
    "blank_canvas_scored",
    "sign_lost",
    "update_ignored",
    "one_seed",
    "pixels_lost",
    "pictures_never_learned",
    "image_marks_lost",
    "optimizer_stopped",
    "one_place_off",
    "micro_batch_skipped",
    "unguided_in_bfloat16",
)
NOT_IN_A_LAB_RUN = {"importance_capped", "lost_workers", "other_weights", "quarantined"}
"""Of overlap, dead processes and other machines."""
BEFORE_THE_FIRST_STEP = {"left_out", "rate_jump", "unlearned_modality"}
"""Of fine-tuning; tried in tests/jobs/test_sft.py and test_sft_checks.py."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def caught(name, cache):
    (fault,) = [fault for fault in FAULTS if fault.name == name]
    outcome = run_fault(fault, cache)
    assert outcome.passed, outcome


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_caught_within_three_steps(name, cache):
    caught(name, cache)


def test_a_clean_run_has_no_alarm(cache):
    outcome = run_clean(CLEAN[0], cache)
    assert outcome.passed, outcome
    assert outcome.steps == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [fault.name for fault in FAULTS if fault.name not in QUICK])
def test_every_fault_is_caught_within_three_steps(name, cache):
    caught(name, cache)


@pytest.mark.slow
@pytest.mark.parametrize("clean", CLEAN[1:], ids=lambda clean: clean.name)
def test_no_clean_run_has_an_alarm(clean, cache):
    outcome = run_clean(clean, cache)
    assert outcome.passed, outcome


def test_the_bank_is_large_and_every_sentinel_is_in_it_or_excused():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    assert len(CLEAN) >= 10
    assert all(fault.what.endswith(".") for fault in FAULTS)
    known = {sentinel.name for sentinel in SENTINELS}
    assert {fault.sentinel for fault in FAULTS} == known - NOT_IN_A_LAB_RUN - BEFORE_THE_FIRST_STEP


def test_the_table_says_what_was_not_caught_and_the_command_then_fails(monkeypatch, capsys):
    (planted,) = [fault for fault in FAULTS if fault.name == "hangs"]
    outcomes = [
        verify_faults.Outcome(name="found", what="A.", planted=3, caught=4, by="stalled"),
        verify_faults.Outcome(name="late", what="B.", planted=3, caught=6, by="stalled"),
        verify_faults.Outcome(name="missed", what="C.", planted=3, also={"far_kl": 3}),
        verify_faults.Outcome(name="early", what="D.", planted=3, caught=3, by="stalled", early={"far_kl": 2}),
        verify_faults.Outcome(name="clean", what="", planted=None, steps=8),
        verify_faults.Outcome(name="noisy", what="", planted=None, steps=8, also={"far_kl": 2}),
    ]
    monkeypatch.setattr(verify_faults, "outcomes", lambda only: iter(outcomes))
    assert verify_faults.main() == 1
    shown = capsys.readouterr().out
    for words in ("TOO LATE", "NOT CAUGHT", "FALSE ALARM of far_kl", "no alarm", "1 of 4 faults", "1 of 2 clean runs"):
        assert words in shown
    outcomes[1:4] = []
    del outcomes[-1]
    assert verify_faults.main(as_json=True) == 0
    assert planted.what.endswith("while.")


def test_an_unknown_fault_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="there are right_whatever_is_said"):
        next(verify_faults.outcomes(["nothing"]))
    assert DataConfig().cache_dir
