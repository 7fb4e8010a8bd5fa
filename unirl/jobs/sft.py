"""Fine-tuning on conversations of text and images (UnifiedVisual): one restricted cross-entropy step after another."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unirl.cluster.plan import (
    cluster_address,
    count_parameters,
    encoder_plan,
    machine_resources,
    render_plan,
    sft_plan,
    shortages,
)
from unirl.cluster.sft_worker import SftWorker, TokenSources, num_steps, open_mixture
from unirl.config import SftConfig
from unirl.config_loading import load_config
from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError
from unirl.data.mixture import Mixture
from unirl.evaluation.exam import exam_rows
from unirl.evaluation.sft_report import write_sft_report
from unirl.jobs.assets import check_conversations, resolve_checkpoint
from unirl.jobs.conversations import changed_sources, token_sources
from unirl.jobs.exam import check_exam, take_exam
from unirl.jobs.interrupts import Interrupted, Interrupts
from unirl.jobs.mirrors import local_problems, mirrors_of
from unirl.jobs.rl import is_due
from unirl.jobs.run_dirs import check_changes, choose_run_dir, is_complete, is_run, last_step, newest_commit
from unirl.jobs.sft_checks import LEAST_STEPS, changed_rate, find_unlearned, left_out, unmoved, what_ends
from unirl.learner.commits import prune
from unirl.models.policy import check_family
from unirl.monitoring.alerts import warn_of_alerts
from unirl.monitoring.durable_files import write_atomic
from unirl.monitoring.heartbeat import Heartbeat, driver_heartbeat
from unirl.monitoring.log_files import log_to_files
from unirl.monitoring.run_facts import changed_lines, changed_settings
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.stalls import stall_watch
from unirl.monitoring.step_clock import StepClock
from unirl.monitoring.terminal import Terminal

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """The learner's ranks, as actors or in this process."""

    @property
    def num_passes(self) -> int:
        """Passes that this process itself made through the model, since the start."""
        ...

    def update(self, step: int) -> dict[str, float]:
        """Learn from the sequences of a step, counted from 1; returns metrics."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over held-out sequences; empty when there are none."""
        ...

    def save(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        """Commit a checkpoint."""
        ...

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the newest checkpoint; returns the `state` saved with it."""
        ...

    def export(self, folder: Path) -> None:
        """Write the policy as a checkpoint folder."""
        ...

    def close(self) -> None:
        """Free what they hold."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """A run's record and face."""

    config: SftConfig
    record: RunLog
    terminal: Terminal
    clock: StepClock
    interrupts: Interrupts
    beat: Heartbeat
    last: int
    """Its last step."""
    data: dict[str, Any]
    """What tells the sequences of its steps: fingerprint of each source's tokens, sequences of an epoch."""

    def evaluate(self, ranks: Ranks, step: int) -> None:
        """Score the held-out sequences."""
        with self.clock.phase("evaluate"):
            if result := ranks.evaluate():
                write_atomic(self._evaluation(f"heldout_{step:06d}.json"), json.dumps(result).encode())
                shown = ", ".join(f"{name} {value:.4f}" for name, value in result.items() if name.startswith("sft/n"))
                log.info("held-out after step %d: %s", step, shown)
                self._compare(result, step)

    def _compare(self, result: dict[str, float], step: int) -> None:
        """Say so if the held-out sequences are as likely as before training, though the run is half over."""
        first = self._evaluation("heldout_000000.json")
        half = step >= max(LEAST_STEPS, self.last / 2)
        before = json.loads(first.read_text()) if half and first.is_file() else {}
        if message := unmoved(before, result):
            self.record.alert("flat_loss", message, step)

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out sequences were scored after this step."""
        return self._evaluation(f"heldout_{step:06d}.json").is_file()

    def _evaluation(self, name: str) -> Path:
        return self.record.run_dir / "evaluations" / name

    def take_exam(self, checkpoint: Path, step: int) -> None:
        """Let a checkpoint answer the exam; the policy after `step` steps."""
        with self.clock.phase("exam"):
            exam = take_exam(self.config, checkpoint, self.record.save_evaluation_image)
        write_atomic(self.record.run_dir / "evaluations" / exam_name(step), json.dumps(exam).encode())
        self.record.event("exam", f"exam after step {step}", {"step": step, "file": exam_name(step)})

    def save(self, ranks: Ranks, step: int) -> None:
        """Commit a checkpoint from which the run goes on as if nothing had happened."""
        with self.clock.phase("save"):
            checkpoints = self.record.run_dir / "checkpoints"
            ranks.save(checkpoints, step, {"step": step, "data": self.data})
            self.record.sync()
            prune(checkpoints, self.config.train.keep_checkpoints, onsets=self.record.onsets)
            self.record.event("checkpoint", f"saved after step {step}", {"step": step})


def exam_name(step: int) -> str:
    """The file of an exam below evaluations/."""
    return f"exam_{step:06d}.json"


def train(ranks: Ranks, run: Run, first_step: int) -> None:
    """Steps `first_step` to the last, with evaluations and checkpoints between them.

    Raises:
        Interrupted: a signal came; the steps finished so far are saved.
        StoppedByAlertError: a sentinel ended the run, which is saved.
    """
    config = run.config
    for step in range(first_step, run.last + 1):
        if (step == 1 or is_due(step - 1, config.evaluation.every)) and not run.is_evaluated(step - 1):
            run.evaluate(ranks, step - 1)
        with run.clock.phase("update"):
            metrics = ranks.update(step)
        seconds = run.clock.take_seconds()
        metrics |= {f"time/{phase}_s": value for phase, value in seconds.items()} | {
            "time/step_s": sum(seconds.values())
        }
        run.record.record_sft_step(step, metrics)
        run.terminal.step(step, metrics)
        asked_to_end = run.interrupts.received
        if asked_to_end or step == run.last or run.record.stopping or is_due(step, config.train.save_every):
            run.save(ranks, step)
        run.record.check_alerts()
        if asked_to_end:
            run.interrupts.check()
    if not run.is_evaluated(run.last):
        run.evaluate(ranks, run.last)
        run.record.check_alerts()
    ranks.export(run.record.run_dir / "policy")


def main(config: SftConfig, *, local: bool = False, resume: str | None = None, dry_run: bool = False) -> int:
    """Run or resume a fine-tuning job; returns the exit code.

    Args:
        config: all settings.
        local: run everything in this process, without Ray.
        resume: a run directory to go on with.
        dry_run: show settings and memory; encode and start nothing.

    Raises:
        ConfigError: several learner ranks in one process, an unknown subset of the exam, a checkpoint of another
            family, or settings that a run cannot change on its way.
        DataError: conversations, tokens, a checkpoint or a run directory that cannot be used.
        PlacementError: this machine cannot hold the learner.
    """
    if local:
        _check_local(config)
    check_exam(config)
    checkpoint = resolve_checkpoint(config.model.path).absolute()
    check_family(config.model, checkpoint)
    if dry_run:
        return _show_plan(config, checkpoint, local=local)
    chosen, resumed = choose_run_dir(config, resume)
    run_dir = chosen.absolute()
    before = load_config([run_dir / "config.yaml"], [], SftConfig) if resumed else config
    changed = changed_settings(config, since=before)
    check_changes(changed, run_dir)
    if not resumed and is_run(run_dir):
        raise DataError(
            f"run directory {run_dir}: expected a new folder; got one that holds a run; go on with --resume {run_dir}, "
            "or set another train.run_dir"
        )
    mirrors = mirrors_of(config.monitoring, local=local)
    with Interrupts() as interrupts, ExitStack() as stack:
        if not local:
            _join_ray(config, checkpoint, stack, run_dir / "logs")
        tokens = _tokens(config, checkpoint, local=local)
        mixture = open_mixture(tokens.training, config.data.sources, config)
        last, unlearned = num_steps(config, mixture), find_unlearned(config, mixture)
        ending = what_ends(config, mixture)
        if resumed and is_complete(run_dir, last, ending):
            sys.stdout.write(f"{run_dir} is finished; to go further, raise {ending[0]}\n")
            return 0
        marks = {name: mark for name, (_, mark) in sorted(tokens.training.items())}
        data = {"tokens": marks, "epoch_size": mixture.epoch_size}
        if resumed:
            _check_data(run_dir, data, config)
        rate = changed_rate(before, config, mixture, made=last_step(run_dir) or 0)
        record = stack.enter_context(
            RunLog(
                run_dir,
                config,
                config.monitoring,
                overrides=sys.argv[1:],
                facts={"job": "sft", "local": local, "num_steps": last},
                resume=resumed,
                mirrors=mirrors,
            )
        )
        stack.enter_context(log_to_files(run_dir, verbose=log.isEnabledFor(logging.DEBUG)))
        run = _open_run(config, record, interrupts, last, data)
        stack.enter_context(run.beat)
        record.note_changes(changed)
        _say(record, {"unlearned_modality": unlearned, "left_out": left_out(mixture), "rate_jump": rate})
        run.terminal.banner(_banner(run_dir, mixture, last, local=local))
        return _learn(run, checkpoint, tokens, resumed=resumed, local=local)


def _say(record: RunLog, alerts: dict[str, list[str]]) -> None:
    """What is to be said before the first step, by sentinel."""
    for sentinel, messages in alerts.items():
        for message in messages:
            record.alert(sentinel, message)


def _learn(run: Run, checkpoint: Path, tokens: TokenSources, *, resumed: bool, local: bool) -> int:
    """Start the ranks and train; returns the exit code."""
    record, run_dir = run.record, run.record.run_dir
    try:
        if run.config.evaluation.exam == "lab" and not (run_dir / "evaluations" / exam_name(0)).is_file():
            run.take_exam(checkpoint, 0)
        with _open_ranks(run.config, checkpoint, tokens, local=local) as ranks:
            first_step = 1
            if resumed and last_step(run_dir) is not None:
                first_step = ranks.restore(run_dir / "checkpoints")["step"] + 1
            record.accept()
            run.terminal.banner({"ready": f"step {first_step} is next"})
            run.beat.count_passes = lambda: ranks.num_passes
            with run.terminal, stall_watch(record, run.beat, run.config.monitoring.stall_after_s):
                run.interrupts.defer()
                train(ranks, run, first_step)
        run.interrupts.hasten()
        if run.config.evaluation.exam == "lab":
            run.take_exam(run_dir / "policy", run.last)
    except (Interrupted, KeyboardInterrupt) as ending:
        record.end("interrupted", str(ending) or "ended at once")
        saved = isinstance(ending, Interrupted) or last_step(run_dir) == run.last
        done = "saved and ended" if saved else "ended without saving"
        sys.stderr.write(f"{done}; go on with: {record.resume_command}\n")
        return run.interrupts.exit_code
    record.end("finished")
    _show_result(run)
    return 0


def _check_local(config: SftConfig) -> None:
    """Refuse what one process cannot do.

    Raises:
        ConfigError: several learner ranks, or what only Ray serves.
    """
    problems = local_problems(config.monitoring)
    if config.learner.num_ranks != 1:
        rule = "must be 1 with --local, which has one process"
        problems.append(Problem("learner.num_ranks", config.learner.num_ranks, rule, "try learner.num_ranks=1"))
    if problems:
        raise ConfigError(problems)


def _check_data(run_dir: Path, data: dict[str, Any], config: SftConfig) -> None:
    """Refuse to go on when the steps would be others than those that the newest checkpoint was on its way through.

    Raises:
        DataError: names the sources that have changed.
    """
    commit = newest_commit(run_dir)
    before = commit["state"]["run"]["data"] if commit else data
    if before == data:
        return
    changed = changed_sources(before["tokens"], data["tokens"], config.data.sources)
    changed = changed or [f"{before['epoch_size']} sequences an epoch became {data['epoch_size']}"]
    raise DataError(
        f"{run_dir}: expected the data that the run began with; got others: {'; '.join(changed)}; restore them, or "
        "start a new run from the exported policy"
    )


def _show_result(run: Run) -> None:
    """The exam before and after, and where things lie."""
    run_dir = run.record.run_dir
    run.terminal.banner({"report": write_sft_report(run_dir), "policy": run_dir / "policy"})
    exams = [run_dir / "evaluations" / exam_name(step) for step in (0, run.last)]
    if all(file.is_file() for file in exams):
        rows = exam_rows(*(json.loads(file.read_text()) for file in exams))
        cells = [(row.metric, *map(_shown, (row.before, row.after, row.gain))) for row in rows]
        run.terminal.table("exam, 95 % intervals", ("", "before", "after", "gain"), cells)
    warn_of_alerts(run_dir)


def _shown(estimate: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*estimate)


def _open_run(config: SftConfig, record: RunLog, interrupts: Interrupts, last: int, data: dict[str, Any]) -> Run:
    clock = StepClock()
    quiet = not log.isEnabledFor(logging.INFO)
    terminal = Terminal(last, waiting_for=lambda: clock.current, quiet=quiet)
    beat = driver_heartbeat(record.run_dir, config.monitoring, clock)
    return Run(config, record, terminal, clock, interrupts, beat, last, data)


def _join_ray(config: SftConfig, checkpoint: Path, stack: ExitStack, log_dir: Path) -> None:
    import ray

    from unirl.cluster.runtime import start_ray

    stack.callback(ray.shutdown)
    plan = sft_plan(config, count_parameters(checkpoint))
    start_ray(config.cluster, plan, log_dir, heartbeat_s=config.monitoring.heartbeat_s)


def _tokens(config: SftConfig, checkpoint: Path, *, local: bool) -> TokenSources:
    """The token stores, made by Ray Data's workers unless everything runs in this process."""
    if local:
        return token_sources(config, checkpoint)
    from unirl.cluster.sft_group import encode_in_parallel

    return token_sources(
        config, checkpoint, lambda units, folder: encode_in_parallel(units, config, checkpoint, folder)
    )


@contextmanager
def _open_ranks(config: SftConfig, checkpoint: Path, tokens: TokenSources, *, local: bool) -> Iterator[Ranks]:
    """The learner's ranks, ended whatever happens."""
    with ExitStack() as stack:
        if local:
            ranks: Ranks = SftWorker(config, checkpoint, tokens, 0, ("127.0.0.1", 0))
        else:
            from unirl.cluster.placement import place
            from unirl.cluster.sft_group import SftGroup

            placement = place(config)
            stack.callback(placement.release)
            ranks = SftGroup(config, checkpoint, tokens, placement)
        stack.callback(ranks.close)
        yield ranks


def _banner(run_dir: Path, mixture: Mixture, last: int, *, local: bool) -> dict[str, object]:
    counts = ", ".join(f"{count:,} {name}" for name, count in mixture.counts().items())
    return {
        "run": run_dir,
        "data": f"{counts}: {mixture.epoch_size:,} sequences an epoch, {mixture.steps_per_epoch:,} steps",
        "steps": f"{last:,} in all",
        "where": "all in this process" if local else "Ray actors",
        "stop": "Ctrl-C saves and ends once steps are made; again, or during the start, ends at once",
    }


def _show_plan(config: SftConfig, checkpoint: Path, *, local: bool) -> int:
    """Print settings, actors and memory of a run on stdout; 2 when it would not fit.

    Raises:
        DataError: data are not there.
    """
    for source in (*config.data.sources.values(), *config.evaluation.sources.values()):
        check_conversations(source.path)
    learner, encoders = sft_plan(config, count_parameters(checkpoint)), [] if local else encoder_plan(config)
    problems: list[str] = []
    if local:
        where = "--local: all of this in one process"
    elif address := cluster_address(config.cluster):
        where = f"CPUs and GPUs of the cluster at {address} are compared when the run starts"
    else:
        where = "on a Ray started here; encoders end before the learner starts"
        problems = [p for plan in (encoders, learner) for p in shortages(plan, machine_resources(config.cluster))]
    lines = ["settings that differ from the defaults:", *changed_lines(config), "", render_plan([*encoders, *learner])]
    sys.stdout.write("\n".join([*lines, where, *(f"does not fit: {problem}" for problem in problems)]) + "\n")
    return 2 if problems else 0
