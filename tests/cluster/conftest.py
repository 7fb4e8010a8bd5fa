import os
import signal
from dataclasses import replace

import pytest

from unirl.config import RewardConfig, RlConfig, RolloutConfig, WorkersConfig
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout
from unirl.rollout.seeds import sample_seed
from unirl.types import RolloutRequest


@pytest.fixture(scope="session")
def checkpoint():
    return resolve_checkpoint("lab:janus")


@pytest.fixture(scope="session")
def config():
    """Small units, so that two workers share the work; the plain sampler, so that an actor starts in seconds."""
    workers = WorkersConfig(num_workers=2, num_cpus=0.5)
    rollout = RolloutConfig(
        backend="torch", sequences_per_unit=4, text=WorkersConfig(num_workers=0), image=WorkersConfig(num_workers=0),
        both=workers, timeout_s=400.0,
    )  # fmt: skip
    return replace(RlConfig(), rollout=rollout)


@pytest.fixture(scope="session")
def alone(config):
    """The same with one worker, for what needs no company."""
    return replace(config, rollout=replace(config.rollout, both=replace(config.rollout.both, num_workers=1)))


@pytest.fixture(scope="session")
def requests_of():
    """The first n held-out samples of each task as requests with k seeds each."""

    def make(num_samples, num_seeds):
        understanding, generation = resolve_heldout("lab:heldout", num_samples)
        sides = [("understanding", sample) for sample in understanding] + [("generation", s) for s in generation]
        return [
            RolloutRequest(
                request_id=f"{sample.id}/{task}", pair_id=sample.id, task=task, sample=sample,
                seeds=tuple(sample_seed(0, 0, sample.id, task, k) for k in range(num_seeds)),
            )
            for task, sample in sides
        ]  # fmt: skip

    return make


@pytest.fixture(scope="session")
def kill_actor(ray_session):
    """SIGKILL an actor's process."""

    def kill(handle):
        pid = ray_session.get(handle.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGKILL)

    return kill


@pytest.fixture(scope="session")
def reward():
    return RewardConfig(num_cpus=0.25, timeout_s=20.0)
