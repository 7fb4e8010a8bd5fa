"""Sampling beside learning: which weights draw what, that it repeats, and that nothing hangs."""

import json
import re
import signal
from contextlib import contextmanager

import pytest

from tests.jobs.runs import IN_ONE_PROCESS, SMALL, finish, signal_at_step, start, weights_of
from unirl import cli
from unirl.config_loading import load_config
from unirl.jobs.assets import resolve_checkpoint, resolve_pairs
from unirl.jobs.flow import OneStepOff
from unirl.jobs.parts import open_parts
from unirl.jobs.step import learn_step, sample_step
from unirl.monitoring.journal import read_step
from unirl.monitoring.metrics import step_metrics
from unirl.monitoring.step_clock import StepClock

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    settings = [*SMALL, "rollout.backend=torch", f"train.num_steps={STEPS}", f"data.cache_dir={cache}"]
    return load_config([], settings)


@contextmanager
def parts_of(config):
    pairs = resolve_pairs(config.data.pairs, config.data.cache_dir)
    with open_parts(config, resolve_checkpoint(config.model.path), pairs, local=True) as made:
        yield made


@pytest.fixture
def parts(config):
    with parts_of(config) as made:
        yield made


@pytest.fixture(scope="module")
def by_hand(config):
    """Checksums of the same schedule without threads: step s is drawn by the weights of step s - 2."""
    with parts_of(config) as parts:
        clock, checksums = StepClock(), []
        newest = parts.learner.publish_weights()
        parts.rollouts.load_weights(newest)
        waiting = [sample_step(1, parts, config, clock)]
        for step in range(1, STEPS + 1):
            parts.rollouts.load_weights(newest)
            if step < STEPS:
                waiting.append(sample_step(step + 1, parts, config, clock))
            data, newest = learn_step(waiting.pop(0), parts, config, clock)
            checksums.append(data.weights_checksum)
    return checksums


def test_one_step_off_is_the_loop_by_hand(by_hand, parts, config):
    flow = OneStepOff(parts, config, StepClock(), 1)
    steps = [flow.run_step(step) for step in range(1, STEPS + 1)]
    versions = [{t.policy_version for group in data.groups for t in group.scored.group.trajectories} for data in steps]
    assert versions == [{0}, {0}, {1}, {2}]
    assert [data.policy_version for data in steps] == [0, 1, 2, 3]
    assert all("rollout" in data.overlapped and "rollout" not in data.seconds for data in steps)
    for data in steps:
        phases = {name: value for name, value in step_metrics(data).items() if name.startswith("phase/")}
        assert sum(phases.values()) == pytest.approx(sum(data.seconds.values()), abs=1e-9)
        assert phases["phase/idle_s"] == pytest.approx(data.seconds["wait"]), "what is sampled meanwhile is not counted"
        assert phases["phase/text_rollout_s"] == phases["phase/reward_s"] == 0
        assert min(phases["phase/backward_s"], phases["phase/score_s"], phases["phase/sync_s"]) > 0
    assert [data.weights_checksum for data in steps] == by_hand
    assert len(set(by_hand)) == STEPS


def test_what_fails_beside_the_learner_ends_the_step_that_waits_for_it(parts, config, monkeypatch):
    sample = parts.rollouts.sample

    def fails_in_step_2(requests, sampling):
        if asked:
            raise RuntimeError("the sampler broke")
        asked.append(1)
        return sample(requests, sampling)

    asked = []
    monkeypatch.setattr(parts.rollouts, "sample", fails_in_step_2)
    flow = OneStepOff(parts, config, StepClock(), 1)
    flow.run_step(1)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        flow.run_step(2)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        flow.settle()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flows")


@pytest.mark.slow
def test_a_run_one_step_off_that_is_killed_and_resumed_is_the_run_that_was_not(folder):
    evaluated = ("evaluation.enabled=true", "evaluation.every=1", "evaluation.num_prompts=4", "evaluation.greedy=false")
    settings = (*SMALL, "rollout.backend=torch", "train.num_steps=6", "overlap.mode=one_step_off", *evaluated)
    runs = {name: folder / name for name in ("whole", "killed")}
    started = {run_dir: start(folder, name, f"train.run_dir={run_dir}", *settings) for name, run_dir in runs.items()}
    signal_at_step(started, 3, {runs["killed"]: signal.SIGKILL})
    finish(started[runs["whole"]], folder, "whole")
    finish(started[runs["killed"]], folder, "killed", -9)
    finish(start(folder, "killed", "--resume", str(runs["killed"])), folder, "killed")
    assert weights_of(runs["whole"]) == weights_of(runs["killed"])
    for step in range(1, 7):
        ours, theirs = (read_step(run_dir, step) for run_dir in runs.values())
        assert [row.completion_ids.tolist() for row in ours] == [row.completion_ids.tolist() for row in theirs]
        assert {row.policy_version for row in ours} == {max(0, step - 2)}
    lines = [json.loads(line) for line in (runs["whole"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/staleness_mean"] for line in lines] == [0, 1, 1, 1, 1, 1]
    assert all(abs(line["policy/importance_mean"] - 1) < 0.1 for line in lines[1:])


def test_bounded_staleness_keeps_its_bound_and_records_the_weights_of_every_token(folder):
    run_dir = folder / "bounded"
    settings = ("overlap.mode=bounded_staleness", "overlap.in_flight_updates=true", "rollout.sequences_per_unit=4")
    arguments = (f"train.run_dir={run_dir}", *SMALL, "rollout.backend=torch", "train.num_steps=12", *settings)
    finish(start(folder, "bounded", *arguments), folder, "bounded")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert max(line["rollout/staleness_max"] for line in lines) in (1, 2)
    for line in lines:
        shares = {int(name.rsplit("/", 1)[1]): line[name] for name in line if name.startswith("rollout/staleness/")}
        assert sum(shares.values()) == pytest.approx(1)
        assert line["rollout/staleness_mean"] == pytest.approx(sum(k * share for k, share in shares.items()))
        rows = read_step(run_dir, line["step"])
        for row in rows:
            versions = [version for _, version in row.version_spans] or [row.policy_version]
            assert row.policy_version == min(versions) >= line["step"] - 1 - 2
            assert max(versions) <= line["step"] - 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["overlap.mode=one_step_off", *IN_ONE_PROCESS], "overlap.mode .* must be synchronous with --local"),
        (["overlap.in_flight_updates=true"], "needs overlap.mode=bounded_staleness"),
        (["overlap.mode=one_step_off", "algorithm.image_logprob=conditional"], "must be guided"),
        (["overlap.mode=one_step_off", "monitoring.journal=false"], "must be true"),
        (["overlap.max_staleness=0", "overlap.mode=bounded_staleness"], "must be at least 1"),
    ],
)
def test_what_cannot_overlap_is_one_error(folder, arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", f"data.cache_dir={folder / 'cache'}", *arguments])
    assert ended.value.code == 2
    assert re.search(words, capsys.readouterr().err)
