"""Going on with a run that ended: its newest checkpoint, then the steps recorded since, made again from the journal."""

from collections.abc import Iterable

from unirl.config import RlConfig
from unirl.jobs.parts import Parts
from unirl.jobs.rebuild import redo_step
from unirl.jobs.run_dirs import last_step
from unirl.jobs.step import results_of
from unirl.monitoring.journal import forget_after, recorded_steps, weights_after
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.sentinel_table import alert_fields, sentinel_of


def restore(parts: Parts, config: RlConfig, record: RunLog, *, follow: bool) -> tuple[int, bool]:
    """Load the newest checkpoint, then make the updates of the steps recorded since.

    Returns the step to go on with, and whether a checkpoint is owed for what was made again.

    Args:
        parts: fresh.
        config: the settings that the run goes on with.
        record: the run directory.
        follow: whether those updates, and what was sampled for the next step, are what these settings would do; else
            the steps since the checkpoint are sampled anew.
    """
    run_dir, saved = record.run_dir, 0
    if last_step(run_dir) is not None:
        state = parts.learner.restore(run_dir / "checkpoints")
        parts.pairs.restore(state["pairs"])
        saved = state["step"]
    if not follow:
        forget_after(run_dir, saved)
        if parts.ahead is not None:
            parts.ahead.clear()
    steps = recorded_steps(run_dir, saved)
    # A step that overlaps the learner is drawn by the weights before the last update.
    published = parts.learner.publish_weights()
    for step in steps:
        before = published
        pairs = parts.pairs.lease(step - 1)
        weighted, _ = redo_step(parts.learner, run_dir, step, pairs, config.algorithm)
        parts.pairs.record(step - 1, results_of(weighted, pairs))
        if config.overlap.mode != "synchronous" and step == steps[-1]:
            parts.rollouts.load_weights(before)
        published = parts.learner.publish_weights()
        compare(published.manifest.checksum, step, parts, record)
        if parts.ahead is not None:
            parts.ahead.drop(step)
    if config.overlap.mode != "synchronous" and not steps:
        parts.rollouts.load_weights(published)
    if steps:
        record.event("caught up", f"steps {steps[0]} to {steps[-1]} were made again from the journal")
    return saved + len(steps) + 1, bool(steps)


def compare(checksum: str, step: int, parts: Parts, record: RunLog) -> None:
    """Say when a step made again gave other weights than the run's; its later rollouts are of no use then."""
    recorded = weights_after(record.run_dir, step)
    if recorded and checksum != recorded:
        message = f"step {step}, made again from the journal, gave other weights than the run's"
        fields = alert_fields(sentinel_of("other_weights"), step)
        record.event("alert", message, fields | {"checksum": checksum, "recorded": recorded})
        if parts.ahead is not None:
            parts.ahead.clear()


COURSE = (
    "model.",
    "rollout.sampling.",
    "rollout.num_",
    "rollout.backend",
    "algorithm.",
    "learner.",
    "rewards.",
    "overlap.",
)
"""Settings, or groups of them, that decide what a step samples, earns and learns."""
HARMLESS = (
    "timeout_s",
    "max_restarts",
    "max_attempts",
    "num_workers",
    "num_cpus",
    "num_gpus",
    "cache_entries",
    "nvme_path",
)
"""Among these, what decides nothing but where and how patiently."""


def keeps_course(config: RlConfig, changed: Iterable[str]) -> bool:
    """Whether a run that is resumed with these changed settings would have done the same up to here."""
    moves = COURSE if config.learner.schedule == "constant" else (*COURSE, "train.num_steps")
    return not any(key.startswith(moves) and not key.endswith(HARMLESS) for key in changed)
