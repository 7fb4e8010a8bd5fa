"""Runs that differ by arm and seed, one command each, and one table of what the arms gain."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from unirl.config import AblationConfig, RlConfig, SftConfig
from unirl.config_loading import load_config, to_yaml
from unirl.config_rules import ConfigError, Problem
from unirl.data.atomic import DataError, atomic_file
from unirl.evaluation.ablation import Arm, Cell, common_measures, compare, mean_of, measures_of, training_rewards
from unirl.evaluation.ablation_report import Ablation, Curve, write_ablation_report
from unirl.jobs.assets import check_conversations, check_heldout, check_pairs, resolve_checkpoint
from unirl.jobs.commands import CommandError, Commands, RunCommand, folder_of_runs, keep_settings, words_of_run
from unirl.jobs.interrupts import Interrupted
from unirl.jobs.run_dirs import is_finished

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One run of the grid."""

    arm: str
    seed: int
    config: RlConfig | SftConfig
    folder: Path
    """Of its arm."""

    @property
    def run_dir(self) -> Path:
        """Its run directory; its settings and its output lie beside it."""
        return self.folder / f"seed-{self.seed}"

    def beside(self, suffix: str) -> Path:
        """A file beside the run directory."""
        return self.folder / f"seed-{self.seed}{suffix}"


def main(
    config: AblationConfig,
    *,
    local: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    run: RunCommand | None = None,
) -> int:
    """Make all runs, or what is left of them, and compare them; returns the exit code.

    Args:
        config: the grid; `run_dir` of an unfinished one goes on with it.
        local: each run in one process, without Ray.
        dry_run: show what would be run; start nothing.
        as_json: print the table as JSON.
        run: runs a command of unirl; None starts a process.

    Raises:
        ConfigError: an arm's settings are wrong; its keys are named after the arm.
        DataError: the folder's grid was begun with other settings, or it is a run; or a checkpoint, pair set or data of
            an arm are not there.
        ValueError: no run of the reference is finished.
    """
    folder = folder_of_runs(config.run_dir, config.name)
    runs = list(runs_of(config, folder))
    _check_assets([each for each in runs if not is_finished(each.run_dir)])
    if dry_run:
        left = [str(run.run_dir) for run in runs if not is_finished(run.run_dir)]
        sys.stdout.write(json.dumps({"runs": len(runs), "left": left}) + "\n" if as_json else _plan(config, runs))
        return 0
    for each in runs:
        keep_settings(each.beside(".yaml"), to_yaml(each.config))
    left = [each for each in runs if not is_finished(each.run_dir)]
    log.info("%s: %d runs, %d of them finished", folder, len(runs), len(runs) - len(left))
    try:
        with Commands() as commands:
            failed = _make(left, config, run or commands.run, ["--local"] if local else [])
    except Interrupted as ending:
        sys.stderr.write(f"ended; go on with the same command and --run-dir {folder}\n")
        return ending.exit_code
    for each, error in failed:
        log.error("%s, seed %d: %s", each.arm, each.seed, error)
    ablation = measured(config, runs)
    with atomic_file(folder / "ablation.json") as file:
        file.write(json.dumps(ablation.as_json(), indent=1).encode())
    page = write_ablation_report(folder, ablation)
    sys.stdout.write(json.dumps(ablation.as_json()) + "\n" if as_json else f"{_text(ablation)}\n{page}\n")
    return failed[0][1].exit_code if failed else 0


def runs_of(config: AblationConfig, folder: Path) -> Iterator[ArmRun]:
    """Every run of the grid; all arms with one seed come before the next seed, so that a part is a whole comparison.

    Raises:
        ConfigError: an arm's settings are wrong.
    """
    for seed in config.seeds:
        for name, arm in config.arms.items():
            try:
                files = [*config.files, *arm.files]
                settings = [*config.settings, *arm.settings, f"train.seed={seed}"]
                is_sft = config.job == "sft"
                loaded = load_config(files, settings, SftConfig) if is_sft else load_config(files, settings, RlConfig)
            except ConfigError as error:
                raise ConfigError([_of_arm(name, problem) for problem in error.problems]) from error
            yield ArmRun(arm=name, seed=seed, config=loaded, folder=folder / name)


def _check_assets(runs: Sequence[ArmRun]) -> None:
    """Look for what the runs are made from, as each of them would, making nothing.

    Raises:
        ConfigError: settings in the name of the lab's pairs that cannot be.
        DataError: names the arm, and what is not there.
    """
    looked_at: set[tuple[Callable[[str], object], str]] = set()
    for run in runs:
        for check, name in _assets_of(run.config):
            if (check, name) in looked_at:
                continue
            looked_at.add((check, name))
            try:
                check(name)
            except DataError as error:
                raise DataError(f"arm {run.arm}: {error}") from error


def _assets_of(config: RlConfig | SftConfig) -> Iterator[tuple[Callable[[str], object], str]]:
    yield resolve_checkpoint, config.model.path
    if isinstance(config, SftConfig):
        for source in (*config.data.sources.values(), *config.evaluation.sources.values()):
            yield check_conversations, source.path
        return
    yield check_pairs, config.data.pairs
    if config.evaluation.enabled:
        yield check_heldout, config.evaluation.data


def _of_arm(name: str, problem: Problem) -> Problem:
    """The problem of one arm, and what mends it in a grid."""
    fix = f"add settings=[{problem.key}=VALUE], for every arm" if problem.value == "???" else problem.fix
    return replace(problem, key=f"arm {name}: {problem.key}", fix=fix)


def _make(
    runs: Sequence[ArmRun], config: AblationConfig, run_command: RunCommand, where: list[str]
) -> list[tuple[ArmRun, CommandError]]:
    """Run them, so many at a time; returns those that failed, the others are finished.

    Raises:
        Interrupted: a signal came; what was under way has saved and ended.
    """
    done = iter(range(1, len(runs) + 1))

    def make(run: ArmRun) -> CommandError | None:
        start, error = time.monotonic(), None
        words = words_of_run(config.job, run.beside(".yaml"), run.run_dir)
        try:
            run_command(*words, *where, output=run.beside(".log"))
        except CommandError as raised:
            error = raised
        spent, ending = time.monotonic() - start, "failed" if error else "finished"
        log.info("%d of %d: %s, seed %d, %s after %.0f s", next(done), len(runs), run.arm, run.seed, ending, spent)
        return error

    with ThreadPoolExecutor(config.runs_at_once) as pool:
        errors = list(pool.map(make, runs))
    return [(run, error) for run, error in zip(runs, errors, strict=True) if error]


def measured(config: AblationConfig, runs: Sequence[ArmRun]) -> Ablation:
    """What the finished runs found.

    Raises:
        ValueError: no run of the reference is finished.
    """
    finished = [run for run in runs if is_finished(run.run_dir)]
    arms: list[Arm] = []
    for name in config.arms:
        if own := {run.seed: measures_of(run.run_dir) for run in finished if run.arm == name}:
            arms.append(Arm(name=name, by_seed=own))
    names, reference = [arm.name for arm in arms], config.reference or next(iter(config.arms))
    if reference not in names:
        raise ValueError(
            f"ablation: expected a finished run of {reference}, which the others are compared with; got none; its "
            "output lies beside its run directory"
        )
    measures = common_measures(arms)
    metrics = {name: score.metrics for name, score in config.scores.items()} or {name: (name,) for name in measures}
    notes, unknown = _notes(runs, finished), {name for name, own in metrics.items() if not {*own} <= {*measures}}
    notes += [
        f"Left out: {name}, since not all runs measured {', '.join(metrics.pop(name))}." for name in sorted(unknown)
    ]
    scores = {name: compare(arms, own, reference) for name, own in metrics.items()}
    before = measures_of(finished[0].run_dir, first=True)
    curves: list[Curve] = []
    for title, curve in config.curves.items():
        if curve.score in unknown:
            continue
        places = [(x, arm) for x, arm in zip(curve.x, curve.arms, strict=True) if arm in names]
        points = [(x, scores[curve.score][arm].mean) for x, arm in places]
        curves.append(Curve(title=title, x_label=curve.x_label, points=sorted(points)))
    return Ablation(
        name=config.name,
        arms=names,
        reference=reference,
        scores=scores,
        measures={name: compare(arms, [name], reference) for name in measures},
        before={name: mean_of(before, own) for name, own in metrics.items() if all(m in before for m in own)},
        curves=curves,
        training=training_rewards({name: [run.run_dir for run in finished if run.arm == name] for name in names}),
        notes=notes,
    )


def _notes(runs: Sequence[ArmRun], finished: Sequence[ArmRun]) -> list[str]:
    seeds = sorted({run.seed for run in finished})
    notes = [
        f"{len(finished)} run{'s' * (len(finished) != 1)}, seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}."
    ]
    missing: dict[str, list[str]] = {}
    for run in runs:
        if run not in finished:
            missing.setdefault(run.arm, []).append(str(run.seed))
    if missing:
        shown = "; ".join(f"{arm}, seed {', '.join(own)}" for arm, own in missing.items())
        notes.append(f"Not finished, and left out: {shown}.")
    if len({run.arm for run in finished}) == len(finished):
        notes.append("One seed an arm: the intervals do not hold the noise between runs.")
    return notes


def _plan(config: AblationConfig, runs: Sequence[ArmRun]) -> str:
    """Arms with what they set, and how many runs are left."""
    reference = config.reference or next(iter(config.arms))
    lines = ["all arms: " + " ".join([*config.files, *config.settings])]
    for name, arm in config.arms.items():
        own = " ".join([*arm.files, *arm.settings]) or "nothing more"
        lines.append(f"{name}{' (reference)' if name == reference else ''}: {own}")
    left = sum(not is_finished(run.run_dir) for run in runs)
    seeds = ", ".join(map(str, config.seeds))
    lines.append(f"{len(runs)} runs of `unirl {config.job}`: {len(config.arms)} arms, seeds {seeds}; {left} are left")
    return "\n".join(lines) + "\n"


def _text(ablation: Ablation) -> str:
    """The scores in plain text, a block each."""
    wide = max(map(len, [*ablation.arms, "before training"]))
    lines: list[str] = []
    for name, cells in ablation.scores.items():
        lines.append(name)
        if name in ablation.before:
            lines.append(f"  {'before training':<{wide}}  {ablation.before[name]:.3f}")
        lines += [f"  {arm:<{wide}}  {_shown(cells[arm])}" for arm in ablation.arms]
    how = f"means [95 % intervals], gains over {ablation.reference}; * where the interval of the gain does not hold 0"
    return "\n".join([*lines, *ablation.notes, how])


def _shown(cell: Cell) -> str:
    mean = "{:.3f} [{:.3f}, {:.3f}]".format(*cell.mean)
    if cell.gain is None:
        return mean
    return f"{mean}  {'{:+.3f} [{:+.3f}, {:+.3f}]'.format(*cell.gain)}{' *' * cell.is_certain}"
