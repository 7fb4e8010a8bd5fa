"""A learner that outlives its ranks has, to the bit, the weights of one that was left alone."""

import os
import signal
from dataclasses import replace

import pytest

from tests.jobs.runs import IN_ONE_PROCESS, SMALL, finish, start
from unirl.cluster.gang import LearnerLostError
from unirl.cluster.learner_group import LearnerGroup
from unirl.cluster.placement import place
from unirl.config_loading import load_config
from unirl.data.pair_source import PairSource
from unirl.jobs.assets import resolve_checkpoint, resolve_pairs
from unirl.jobs.parts import pair_settings
from unirl.jobs.rebuild import rebuild_step, redo_step
from unirl.jobs.survival import SurvivingLearner
from unirl.learner.batching import build_batch
from unirl.monitoring.journal import weights_after


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in one process of three steps, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("survival")
    arguments = (f"train.run_dir={folder / 'run'}", *SMALL, "train.num_steps=3", *IN_ONE_PROCESS)
    finish(start(folder, "run", *arguments), folder, "run")
    return folder / "run"


@pytest.fixture(scope="module")
def config(run):
    return load_config([run / "config.yaml"], [])


@pytest.fixture(scope="module")
def pairs(config):
    return PairSource.open(resolve_pairs(config.data.pairs, config.data.cache_dir), **pair_settings(config))


@pytest.fixture
def gang(ray_session, config):
    placement = place(config)
    learner = replace(config.learner, num_cpus=0.5, timeout_s=60.0)
    group = LearnerGroup(replace(config, learner=learner), resolve_checkpoint(config.model.path), placement)
    yield group
    group.close()
    placement.release()


def kill_rank(ray_session, gang, signum=signal.SIGKILL):
    rank = gang._gang._ranks[0]
    os.kill(ray_session.get(rank.__ray_call__.remote(lambda self: os.getpid())), signum)


def test_lost_ranks_come_back_with_the_weights_they_had(ray_session, run, config, pairs, gang):
    redone, events = [], []

    def redo(learner, step):
        redone.append(step)
        redo_step(learner, run, step, pairs.batch(step - 1), config.algorithm)

    checkpoints = run.parent / "none" / "checkpoints"
    learner = SurvivingLearner(gang, checkpoints, redo, limit=2, report=lambda *event: events.append(event))
    batches = [
        build_batch(rebuild_step(run, step, pairs.batch(step - 1), config.algorithm), config.algorithm)
        for step in (1, 2, 3)
    ]
    for step in (1, 2):
        learner.update(batches[step - 1], step)
    kill_rank(ray_session, gang)
    # Without a checkpoint: step 1 through the journal, step 2 from memory, then the update that found the loss.
    learner.update(batches[2], 3)
    assert learner.publish_weights().manifest.checksum == weights_after(run, 3)
    assert redone == [1]
    (event,) = events
    assert event[0] == "restart"
    assert (event[2]["from_step"], event[2]["to_step"]) == (0, 2)
    kill_rank(ray_session, gang)
    assert learner.publish_weights().manifest.checksum == weights_after(run, 3)
    kill_rank(ray_session, gang)
    with pytest.raises(RuntimeError, match=r"3 losses; learner.max_restarts is 2"):
        learner.publish_weights()


def test_a_checkpoint_shortens_the_way_and_a_hung_rank_counts_as_lost(ray_session, run, config, pairs, gang):
    redone = []
    learner = SurvivingLearner(
        gang, run / "checkpoints", lambda _, step: redone.append(step), limit=1, report=lambda *event: None
    )
    assert learner.restore(run / "checkpoints" / "step_00000002")["step"] == 2
    batch = build_batch(rebuild_step(run, 3, pairs.batch(2), config.algorithm), config.algorithm)
    learner.update(batch, 3)
    before = learner.publish_weights().manifest.checksum
    gang._gang._learner = replace(gang._gang._learner, timeout_s=3.0)
    kill_rank(ray_session, gang, signal.SIGSTOP)
    with pytest.raises(LearnerLostError, match=r"no answer within 3 s \(learner.timeout_s\)"):
        gang.publish_weights()
    gang._gang._learner = replace(gang._gang._learner, timeout_s=60.0)
    gang.restart()
    kill_rank(ray_session, gang)
    assert learner.publish_weights().manifest.checksum == before == weights_after(run, 3)
    assert redone == []  # the newest checkpoint is that after step 3
