"""PairGRPO: sample both sides of each pair, score them, weigh them by similarity, update the one policy.

`rl_step` is the whole method on one page, `train` repeats it, `main` wires the rooms.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from unirl.cluster.plan import check_machine
from unirl.config import RlConfig, default_text
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError, Problem
from unirl.data.pair_source import StepResult
from unirl.jobs.assets import resolve_checkpoint, resolve_heldout, resolve_pairs
from unirl.jobs.evaluate import evaluate_policy
from unirl.jobs.interrupts import Interrupted, Interrupts
from unirl.jobs.parts import Parts, open_parts
from unirl.jobs.prompt_check import check_prompts, check_settings, samples_of
from unirl.jobs.run_dirs import check_changes, choose_run_dir, is_complete, last_step
from unirl.jobs.run_summary import banner, show_plan, show_result
from unirl.learner.batching import build_batch, weigh_groups
from unirl.monitoring.control import ScaleControl
from unirl.monitoring.log_files import log_to_files
from unirl.monitoring.run_facts import changed_settings
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.step_data import StepData
from unirl.monitoring.terminal import Terminal
from unirl.rewards.reward import check_rewards
from unirl.rollout.seeds import sample_seed
from unirl.types import (
    TASKS,
    GenerationSample,
    PairRecord,
    QuarantinedRequest,
    RolloutRequest,
    ScoredGroup,
    Task,
    UnderstandingSample,
    WeightedGroup,
)

log = logging.getLogger(__name__)


def rl_step(step: int, parts: Parts, config: RlConfig, clock: StepClock) -> StepData:
    """Sample, score, weigh, learn, publish. Groups are scored while later ones are still being sampled."""
    with clock.phase("pairs"):
        pairs = parts.pairs.lease(step - 1)
        requests = make_requests(pairs, step, config)
    with clock.phase("rollout"):
        groups = parts.rollouts.sample(requests, config.rollout.sampling)
        scored = parts.rewards.score(groups)
        quarantined = parts.rollouts.take_quarantined()
        check_judged(scored, quarantined, config.rewards.max_unjudged_fraction)
    with clock.phase("batch"):
        weighted = weigh_groups(scored, pairs, config.algorithm)
        batch = build_batch(weighted, config.algorithm)
    with clock.phase("update"):
        update = parts.learner.update(batch, step)
    with clock.phase("publish"):
        parts.rollouts.load_weights(parts.learner.publish_weights())
    parts.pairs.record(step - 1, results_of(weighted, quarantined))
    restarts = {"rollout": parts.rollouts.take_restarts(), "reward": parts.rewards.take_restarts()}
    return StepData(
        step=step,
        groups=weighted,
        learner=update,
        seconds=clock.take_seconds(),
        restarts=restarts,
        quarantined=quarantined,
    )


def make_requests(pairs: Sequence[PairRecord], step: int, config: RlConfig) -> list[RolloutRequest]:
    """Both prompts of every pair, with one seed per completion, keyed so that nothing else can change the tokens."""
    requests: list[RolloutRequest] = []
    for pair in pairs:
        sides: tuple[tuple[Task, UnderstandingSample | GenerationSample, int], ...] = (
            ("understanding", pair.understanding, config.rollout.num_understanding),
            ("generation", pair.generation, config.rollout.num_generation),
        )
        for task, sample, count in sides:
            seeds = tuple(sample_seed(config.train.seed, step, pair.pair_id, task, index) for index in range(count))
            name = f"{pair.pair_id}/{task}"
            requests.append(
                RolloutRequest(request_id=name, pair_id=pair.pair_id, task=task, sample=sample, seeds=seeds)
            )
    return requests


def check_judged(scored: Sequence[ScoredGroup], quarantined: Sequence[QuarantinedRequest], limit: float) -> None:
    """Stop when more than a share of a task's completions could not be sampled, or rewards failed on them.

    Raises:
        RuntimeError: names the share, the limit and the first problem.
    """
    for task in TASKS:
        groups = [group for group in scored if group.group.request.task == task]
        lost = [request for request in quarantined if request.task == task]
        num_lost = sum(request.num_completions for request in lost)
        total = num_lost + sum(len(group.judged) for group in groups)
        unjudged = num_lost + sum(int((~group.judged).sum()) for group in groups)
        if unjudged > limit * total:
            problems = chain(
                (f"{request.request_id} could not be sampled: {request.error}" for request in lost),
                (f"{name}: {s.problem}" for g in groups for name, s in g.components.items() if s.problem),
            )
            raise RuntimeError(
                f"rewards: expected at most {limit:.0%} of a step's {task} unjudged (rewards.max_unjudged_fraction); "
                f"got {unjudged} of {total}; first problem: {next(problems, 'none given')}; mend the reward and resume"
            )


def results_of(weighted: Sequence[WeightedGroup], quarantined: Sequence[QuarantinedRequest]) -> list[StepResult]:
    """What each side of each pair earned, for the pairing service's ledger."""
    results = [
        StepResult(pair_id=request.pair_id, task=request.task, mean_reward=None, zero_variance=False)
        for request in quarantined
    ]
    for group in weighted:
        rewards = group.scored.rewards[group.scored.judged]
        results.append(
            StepResult(
                pair_id=group.pair.pair_id,
                task=group.scored.group.request.task,
                mean_reward=float(rewards.mean()) if len(rewards) else None,
                zero_variance=bool(len(rewards) and (rewards == rewards[0]).all()),
            )
        )
    return results


@dataclass(frozen=True, slots=True)
class Run:
    """A run's record and face: where it writes, what it shows, and whether it was asked to end."""

    config: RlConfig
    record: RunLog
    terminal: Terminal
    clock: StepClock
    interrupts: Interrupts

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
            parts.learner.save(self.record.run_dir / "checkpoints", step, {"step": step, "pairs": parts.pairs.state()})
            self.record.sync()
            self.record.event("checkpoint", f"saved after step {step}", {"step": step})


def train(parts: Parts, run: Run, first_step: int) -> None:
    """Steps `first_step` to the last, with evaluations and checkpoints between them.

    Raises:
        Interrupted: a signal came; the steps finished so far are saved.
    """
    config = run.config
    parts.rollouts.load_weights(parts.learner.publish_weights())
    for step in range(first_step, config.train.num_steps + 1):
        due = config.evaluation.enabled and (step == 1 or is_due(step - 1, config.evaluation.every))
        # A resumed run may have it already, or may owe it: an interrupt ends a run before it evaluates.
        if due and (step > first_step or not run.record.has_evaluation(step - 1)):
            run.evaluate(parts, step - 1)
        data = rl_step(step, parts, config, run.clock)
        run.terminal.step(step, run.record.record_step(data))
        last = step == config.train.num_steps
        asked_to_end = run.interrupts.received
        if asked_to_end or last or is_due(step, config.train.save_every):
            run.save(parts, step)
        if asked_to_end:
            run.interrupts.check()
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
        DataError: a checkpoint, pair set or run directory that cannot be used.
        PlacementError: this machine cannot hold the actors.
    """
    if local and config.learner.num_ranks != 1:
        rule = "must be 1 with --local, which has one process"
        raise ConfigError([Problem("learner.num_ranks", config.learner.num_ranks, rule, "try learner.num_ranks=1")])
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
    pairs = resolve_pairs(config.data.pairs, config.data.cache_dir)
    check_prompts(samples_of(config, pairs), config, checkpoint)
    with (
        Interrupts() as interrupts,
        RunLog(run_dir, config, config.monitoring, overrides=sys.argv[1:], resume=resumed) as record,
        log_to_files(run_dir, verbose=log.isEnabledFor(logging.DEBUG)),
    ):
        clock = StepClock()
        terminal = Terminal(
            config.train.num_steps,
            stall_after_s=config.monitoring.stall_after_s,
            waiting_for=lambda: clock.current,
            on_stall=lambda message: record.event("stall", message),
            quiet=not log.isEnabledFor(logging.INFO),
        )
        run = Run(config, record, terminal, clock, interrupts)
        if changed:
            shown = ", ".join(f"{k}: {default_text(a)} -> {default_text(b)}" for k, (a, b) in changed.items())
            log.warning("resumed with other settings: %s", shown)
            record.event("settings", "resumed with other settings", {"changed": changed})
        terminal.banner(banner(config, run_dir, checkpoint, local=local))
        try:
            with open_parts(
                config,
                checkpoint,
                pairs,
                local=local,
                log_dir=run_dir / "logs",
                control=ScaleControl(run_dir, record.event),
            ) as parts:
                first_step = restore(parts, run) if resumed else 1
                record.accept()
                terminal.banner({"ready": f"going on with step {first_step}" if resumed else "step 1 is next"})
                with terminal:
                    interrupts.defer()
                    train(parts, run, first_step)
        except (Interrupted, KeyboardInterrupt) as ending:
            record.end("interrupted", str(ending) or "ended at once")
            done = "saved and ended" if isinstance(ending, Interrupted) else "ended without saving"
            sys.stderr.write(f"{done}; go on with: unirl train --resume {run_dir}\n")
            return interrupts.exit_code
        record.end("finished")
        show_result(config, run_dir, checkpoint, terminal)
    return 0


def restore(parts: Parts, run: Run) -> int:
    """Load the newest checkpoint, if the run got that far; returns the step to go on with."""
    if last_step(run.record.run_dir) is None:
        return 1
    state = parts.learner.restore(run.record.run_dir / "checkpoints")
    parts.pairs.restore(state["pairs"])
    return state["step"] + 1
