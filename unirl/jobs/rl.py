"""PairGRPO: steps (`step.py`) from the first to the last, with evaluations and checkpoints between them.

`train` is the run on one page, `main` wires the rooms; `resume.py` goes on with a run that ended.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from unirl.cluster.plan import actor_plan, check_machine, count_parameters, total_resources
from unirl.config import RlConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError, Problem
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout, resolve_pairs
from unirl.jobs.evaluate import evaluate_policy
from unirl.jobs.flow import open_flow
from unirl.jobs.interrupts import Interrupted, Interrupts
from unirl.jobs.mirrors import local_problems, mirrors_of
from unirl.jobs.parts import Parts, open_parts
from unirl.jobs.prompt_check import check_prompts, check_settings, samples_of
from unirl.jobs.resume import keeps_course, restore
from unirl.jobs.run_dirs import check_changes, choose_run_dir, is_complete, last_step
from unirl.jobs.run_summary import banner, show_plan, show_result
from unirl.learner.commits import prune
from unirl.monitoring.heartbeat import Heartbeat, driver_heartbeat
from unirl.monitoring.log_files import log_to_files
from unirl.monitoring.run_facts import changed_settings
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.stalls import stall_watch
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.step_data import StepData
from unirl.monitoring.terminal import Terminal
from unirl.rewards.reward import check_rewards

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """A run's record and face: where it writes, what it shows, and whether it was asked to end."""

    config: RlConfig
    record: RunLog
    terminal: Terminal
    clock: StepClock
    interrupts: Interrupts
    beat: Heartbeat

    def evaluate(self, parts: Parts, step: int) -> None:
        """Measure the current policy on the held-out samples."""
        with self.clock.phase("evaluate"):
            heldout = resolve_heldout(self.config.evaluation.data, self.config.evaluation.num_prompts)
            save_image = self.record.save_evaluation_image
            result = evaluate_policy(heldout, parts.rollouts, parts.rewards, self.config, save_image)
            self.record.write_quarantined(step, parts.rollouts.take_quarantined())
            self.record.write_evaluation(step, asdict(result))

    def save(self, parts: Parts, step: int) -> None:
        """Commit a checkpoint from which the run goes on as if nothing had happened."""
        with self.clock.phase("save"):
            checkpoints = self.record.run_dir / "checkpoints"
            parts.learner.save(checkpoints, step, {"step": step, "pairs": parts.pairs.state()})
            self.record.sync()
            if parts.ahead is not None:
                parts.ahead.sync()
            # Last: until the lines are safe too, an older checkpoint may be all that fits them.
            prune(checkpoints, self.config.train.keep_checkpoints, onsets=self.record.onsets)
            self.record.event("checkpoint", f"saved after step {step}", {"step": step})

    def note(self, parts: Parts, data: StepData) -> None:
        """Record a finished step, whose rollouts then need no place of their own."""
        self.beat.num_done = data.step
        self.beat.policy_version = data.policy_version + self.config.algorithm.updates_per_step
        self.beat.num_tokens += sum(activity.num_tokens for activity in data.activities)
        self.beat.num_images += sum(activity.num_images for activity in data.activities)
        self.terminal.step(data.step, self.record.record_step(data))
        if parts.ahead is not None:
            parts.ahead.drop(data.step)


def train(parts: Parts, run: Run, first_step: int, *, owed: bool = False) -> None:
    """Steps `first_step` to the last, with evaluations and checkpoints between them; first a checkpoint that is owed.

    Raises:
        Interrupted: a signal came; the steps finished so far are saved.
        StoppedByAlertError: a sentinel ended the run, which is saved.
    """
    config = run.config
    run.beat.count_passes = parts.count_passes
    with open_flow(parts, config, run.clock, first_step) as flow:
        if owed:
            flow.settle()
            run.save(parts, first_step - 1)
        for step in range(first_step, config.train.num_steps + 1):
            due = config.evaluation.enabled and (step == 1 or is_due(step - 1, config.evaluation.every))
            # A resumed run may have it already, or may owe it: an interrupt ends a run before it evaluates.
            if due and (step > first_step or not run.record.has_evaluation(step - 1)):
                flow.settle()
                run.evaluate(parts, step - 1)
            run.note(parts, flow.run_step(step))
            last = step == config.train.num_steps
            asked_to_end = run.interrupts.received
            if asked_to_end or last or run.record.stopping or is_due(step, config.train.save_every):
                flow.settle()
                run.save(parts, step)
            run.record.check_alerts()
            if asked_to_end:
                run.interrupts.check()
        flow.settle()
    if config.evaluation.enabled:
        run.evaluate(parts, config.train.num_steps)
    parts.learner.export(run.record.run_dir / "policy")


def is_due(step: int, every: int) -> bool:
    """Whether something done every n steps is due; 0 means never."""
    return bool(every) and step % every == 0


def main(config: RlConfig, *, local: bool = False, resume: str | None = None, dry_run: bool = False) -> int:
    """Run or resume a training job; returns the exit code.

    Args:
        config: all settings.
        local: run everything in this process, without Ray.
        resume: a run directory to go on with.
        dry_run: show the actor plan and memory; start nothing.

    Raises:
        ConfigError: several learner ranks in one process, rewards that cannot be built, or fewer steps than were made.
        ModuleNotFoundError: a package that mirrors the metrics is not installed.
        DataError: a checkpoint, pair set or run directory that cannot be used.
        PlacementError: this machine cannot hold the actors.
    """
    if local:
        check_local(config)
    check_rewards(config.rewards)
    checkpoint = resolve_checkpoint(config.model.path)
    if dry_run:
        check_settings(config, checkpoint)
        return show_plan(config, checkpoint, local=local)
    run_dir, resumed = choose_run_dir(config, resume)
    changed = changed_settings(config, since=load_config([run_dir / "config.yaml"], [])) if resumed else {}
    check_changes(changed, run_dir)
    if resumed and is_complete(run_dir, config.train.num_steps, ("train.num_steps", config.train.num_steps)):
        sys.stdout.write(f"{run_dir} is finished; to go further, add train.num_steps=N above {last_step(run_dir)}\n")
        return 0
    if not local:
        check_machine(config, checkpoint)
    mirrors = mirrors_of(config.monitoring, local=local)
    pairs = resolve_pairs(config.data.pairs, config.data.cache_dir)
    check_prompts(samples_of(config, pairs), config, checkpoint)
    clock = StepClock()
    with (
        Interrupts() as interrupts,
        RunLog(
            run_dir,
            config,
            config.monitoring,
            overrides=sys.argv[1:],
            facts=facts_of(config, checkpoint, local=local),
            resume=resumed,
            mirrors=mirrors,
        ) as record,
        log_to_files(run_dir, verbose=log.isEnabledFor(logging.DEBUG)),
        driver_heartbeat(run_dir, config.monitoring, clock) as beat,
    ):
        terminal = Terminal(
            config.train.num_steps, waiting_for=lambda: clock.current, quiet=not log.isEnabledFor(logging.INFO)
        )
        run = Run(config, record, terminal, clock, interrupts, beat)
        record.note_changes(changed)
        terminal.banner(banner(config, run_dir, checkpoint, local=local))
        try:
            with open_parts(config, checkpoint, pairs, local=local, record=record) as parts:
                follow = keeps_course(config, changed)
                first_step, owed = restore(parts, config, record, follow=follow) if resumed else (1, False)
                accept(record, config)
                terminal.banner({"ready": f"going on with step {first_step}" if resumed else "step 1 is next"})
                with terminal, stall_watch(record, beat, config.monitoring.stall_after_s):
                    interrupts.defer()
                    train(parts, run, first_step, owed=owed)
        except (Interrupted, KeyboardInterrupt) as ending:
            record.end("interrupted", str(ending) or "ended at once")
            done = "saved and ended" if isinstance(ending, Interrupted) else "ended without saving"
            sys.stderr.write(f"{done}; go on with: {record.resume_command}\n")
            return interrupts.exit_code
        record.end("finished")
        show_result(config, run_dir, checkpoint, terminal)
    return 0


def accept(record: RunLog, config: RlConfig) -> None:
    """Take the settings over as those of the run, and tell its sentinels what evaluations use."""
    record.accept()
    if record.sentinels is not None and config.evaluation.enabled:
        understanding, generation = resolve_heldout(config.evaluation.data, config.evaluation.num_prompts)
        record.sentinels.hold_out([*understanding, *generation])


def facts_of(config: RlConfig, checkpoint: Path, *, local: bool) -> dict[str, object]:
    """What the run holds while it goes on, and what a replay must know: sums depend on how many threads share them.

    An actor has one thread.
    """
    threads, facts = torch.get_num_threads(), {"job": "train", "local": local, "num_steps": config.train.num_steps}
    if local:
        resources = {"CPU": float(threads), "GPU": float(torch.cuda.is_available())}
        return facts | {"learner_threads": threads, "resources": resources}
    needed = total_resources(actor_plan(config, count_parameters(checkpoint)))
    resources = {name: needed[name] for name in ("CPU", "GPU")}
    return facts | {"learner_threads": 1, "resources": resources}


def check_local(config: RlConfig) -> None:
    """Refuse what one process cannot do.

    Raises:
        ConfigError: several learner ranks, rollouts beside the learner, or what only Ray serves.
    """
    rule, mode = "with --local, which has one process", config.overlap.mode
    problems = local_problems(config.monitoring)
    if config.learner.num_ranks != 1:
        problems.append(Problem("learner.num_ranks", config.learner.num_ranks, f"must be 1 {rule}", "set it to 1"))
    if mode != "synchronous":
        fix = "set overlap.mode=synchronous, or leave --local out"
        problems.append(Problem("overlap.mode", mode, f"must be synchronous {rule}", fix))
    if problems:
        raise ConfigError(problems)
