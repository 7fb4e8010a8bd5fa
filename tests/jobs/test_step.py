"""What was sampled before a crash is used, the rest is sampled, and nothing twice."""

import dataclasses

import numpy as np
import pytest

from unirl.config import RlConfig, RolloutConfig
from unirl.data.pair_source import PairSource
from unirl.jobs.assets import resolve_checkpoint
from unirl.jobs.local import LocalRewards, LocalRollouts
from unirl.jobs.parts import Parts
from unirl.jobs.step import make_requests, sample_step
from unirl.jobs.verify import prompts_of
from unirl.monitoring.ahead import AheadFiles
from unirl.monitoring.step_clock import StepClock

# Two groups to a unit of work.
CONFIG = RlConfig(
    rollout=RolloutConfig(
        backend="torch", pairs_per_step=4, num_understanding=2, num_generation=2, sequences_per_unit=4
    )
)


@pytest.fixture(scope="module")
def rollouts():
    return LocalRollouts(CONFIG, resolve_checkpoint("lab:janus"))


@pytest.fixture(scope="module")
def rewards():
    made = LocalRewards(CONFIG.rewards)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pairs():
    return prompts_of(CONFIG, 4)


@pytest.fixture
def run(rollouts, rewards, pairs, tmp_path, monkeypatch):
    """Sample step 1; returns what came out and the requests that reached the sampler."""
    ahead = AheadFiles(tmp_path)

    def sample():
        asked = []
        real = rollouts.sample
        monkeypatch.setattr(rollouts, "sample", lambda rest, s: asked.extend(rest) or real(rest, s), raising=True)
        source = PairSource(pairs, pairs_per_step=4, seed=0)
        sampled = sample_step(1, Parts(source, rollouts, rewards, None, ahead), CONFIG, StepClock())
        monkeypatch.undo()
        return sampled, [request.request_id for request in asked]

    return sample, ahead, make_requests(PairSource(pairs, pairs_per_step=4, seed=0).batch(0), 1, CONFIG)


def facts_of(sampled):
    """Everything an update could see, in bytes."""
    return [
        (scored.group.request.request_id, scored.rewards.tobytes(), scored.judged.tobytes(), *map(bytes_of, group))
        for scored in sampled.scored
        for group in (scored.group.trajectories,)
    ]


def bytes_of(trajectory):
    values = dataclasses.asdict(trajectory)
    return {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def test_finished_rollouts_come_from_disk_bit_for_bit(run):
    sample, _, requests = run
    first, asked = sample()
    assert sorted(asked) == sorted(request.request_id for request in requests)
    again, asked_again = sample()
    assert (first.num_kept, again.num_kept, asked_again) == (0, 8, [])
    assert facts_of(again) == facts_of(first)


def test_a_unit_with_a_missing_group_is_sampled_whole(run):
    sample, ahead, requests = run
    first, _ = sample()
    lost = requests[0]
    assert lost.task == "understanding"
    ahead._file(1, lost).unlink()
    again, asked = sample()
    assert again.num_kept == 6
    assert lost.request_id in asked
    assert len(asked) == 2
    assert facts_of(again) == facts_of(first)


def test_a_damaged_file_and_one_of_another_sample_are_sampled_again(run, caplog):
    sample, ahead, requests = run
    first, _ = sample()
    damaged = ahead._file(1, requests[0])
    damaged.write_bytes(damaged.read_bytes()[:100])
    other = next(r for r in requests[2:] if r.task == requests[0].task)
    renamed = dataclasses.replace(other.sample, id="another")
    assert ahead.read(1, dataclasses.replace(other, sample=renamed)) is None
    assert ahead.read(1, dataclasses.replace(other, seeds=(1, 2))) is None
    assert ahead.read(2, other) is None
    again, _ = sample()
    assert again.num_kept == 6
    assert facts_of(again) == facts_of(first)
    assert requests[0].request_id in caplog.text


def test_a_recorded_step_leaves_nothing_behind(run):
    sample, ahead, requests = run
    sample()
    ahead.sync()
    ahead.drop(1)
    assert ahead.read(1, requests[0]) is None
    assert list(ahead._folder.iterdir()) == []
