import json
from dataclasses import replace

import pytest

from tests.fakes import LosingRollouts
from tests.monitoring.made_run import make_step
from unirl.config import RlConfig, RolloutConfig
from unirl.data.pair_source import PairSource
from unirl.jobs.assets import resolve_checkpoint, resolve_pairs
from unirl.jobs.local import LocalLearner, LocalRewards, LocalRollouts
from unirl.jobs.parts import Parts
from unirl.jobs.step import check_judged, rl_step
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.step_clock import StepClock
from unirl.types import QuarantinedRequest


@pytest.fixture(scope="module")
def config():
    rollout = RolloutConfig(backend="torch", pairs_per_step=4, num_understanding=2, num_generation=2)
    rewards = replace(RlConfig().rewards, max_unjudged_fraction=0.25)
    return replace(RlConfig(), rollout=rollout, rewards=rewards)


@pytest.fixture(scope="module")
def pairs(config, tmp_path_factory):
    folder = resolve_pairs(config.data.pairs, tmp_path_factory.mktemp("cache"))
    return PairSource.open(folder, pairs_per_step=4, seed=0, shuffle=True, max_pairs=64)


@pytest.fixture(scope="module")
def lost(pairs):
    """The answers to the first pair of the first step."""
    return f"{pairs.batch(0)[0].pair_id}/understanding"


@pytest.fixture(scope="module")
def parts(config, pairs, lost):
    checkpoint = resolve_checkpoint(config.model.path)
    learner, rewards = LocalLearner(config, checkpoint), LocalRewards(config.rewards)
    yield Parts(pairs, LosingRollouts(LocalRollouts(config, checkpoint), lost), rewards, learner)
    learner.close()
    rewards.close()


def test_a_step_goes_on_without_a_quarantined_request_and_says_so_everywhere(parts, pairs, config, lost, tmp_path):
    with RunLog(tmp_path / "run", config, config.monitoring) as record:
        data = rl_step(1, parts, config, StepClock())
        metrics = record.record_step(data)
    assert len(data.groups) == 7
    assert lost not in {group.scored.group.request.request_id for group in data.groups}
    assert metrics["rollout/num_quarantined"] == 1
    assert metrics["learner/num_rows"] > 0
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert (line["step"], line["request_id"], line["attempts"]) == (1, lost, 3)
    assert line["error"] == "OSError: made to fail"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert f"{lost} could not be sampled: OSError: made to fail" in [event["message"] for event in events]
    pair_id = lost.split("/", maxsplit=1)[0]
    assert pairs.earnings(pair_id, "understanding").num_unjudged == 1
    assert pairs.earnings(pair_id, "generation").num_steps == 1


def test_what_is_quarantined_counts_as_unjudged():
    """Four groups of eight were judged, one of eight could not be sampled."""
    scored = [group.scored for group in make_step(1).groups]
    lost = QuarantinedRequest(
        request_id="a/generation", pair_id="a", task="generation", num_completions=8, attempts=3, error="e"
    )
    check_judged(scored, [lost], 8 / 40)
    with pytest.raises(RuntimeError, match=r"got 8 of 40; first problem: a/generation could not be sampled: e"):
        check_judged(scored, [lost], 7 / 40)
    check_judged(scored, [], 0.0)
