"""What a training job tells people: the plan before it, the banner at its start, tables and the report at its end."""

import sys
from pathlib import Path

from unirl.cluster.gpu_plan import activations_gib, gpu_loads, render_loads
from unirl.cluster.plan import (
    actor_plan,
    cluster_address,
    count_parameters,
    machine_resources,
    render_plan,
    shortages,
    total_resources,
)
from unirl.config import RlConfig
from unirl.evaluation.evaluate import Estimate, Gain, find_measures
from unirl.evaluation.report import write_report
from unirl.evaluation.run_reader import read_run
from unirl.lab.ceiling import NOTES, clean_ceiling
from unirl.monitoring.alerts import warn_of_alerts
from unirl.monitoring.run_facts import changed_lines, changed_settings
from unirl.monitoring.terminal import Terminal

GIB = 1 << 30


def show_plan(config: RlConfig, checkpoint: Path, *, local: bool) -> int:
    """Print settings, actors, memory and disk of a run on stdout; 2 when it would not fit.

    Args:
        config: all settings.
        checkpoint: folder of the initial policy.
        local: the parts share one process, which asks nobody for CPUs or GPUs.
    """
    num_parameters = count_parameters(checkpoint)
    plan = actor_plan(config, num_parameters)
    needed = total_resources(plan)
    activations = activations_gib(config, checkpoint, num_parameters)
    loads = gpu_loads(plan, config, activations)
    lines = [
        "settings that differ from the defaults:",
        *changed_lines(config),
        "",
        render_plan(plan),
        "",
        *([render_loads(loads, activations), ""] if loads else []),
        f"needs {needed['CPU']:g} CPUs, {needed['GPU']:g} GPUs and {needed['memory']:.1f} GiB of main memory at once",
        f"writes about {disk_gib(config, checkpoint):.2f} GiB: checkpoints, journal, images",
    ]
    problems = [
        f"{' + '.join(role for role, _ in load.parts)}: {load.gib:.1f} GiB on a GPU of 80 GB"
        for load in loads
        if not load.fits
    ]
    if local:
        lines.append("--local: all of this in one process")
    elif address := cluster_address(config.cluster):
        lines.append(f"CPUs and GPUs of the cluster at {address} are compared when the run starts")
    else:
        problems += shortages(plan, machine_resources(config.cluster))
    sys.stdout.write("\n".join(lines + [f"does not fit: {problem}" for problem in problems]) + "\n")
    return 2 if problems else 0


def disk_gib(config: RlConfig, checkpoint: Path) -> float:
    """Estimate of what the run directory will hold."""
    weights = count_parameters(checkpoint) * 4
    kept = config.train.keep_checkpoints or config.train.num_steps // max(1, config.train.save_every)
    rollout = config.rollout
    rows = rollout.pairs_per_step * (rollout.num_understanding + rollout.num_generation)
    journal = config.train.num_steps * rows * 10 * config.rollout.max_model_len if config.monitoring.journal else 0
    return (weights * (3 * kept + 1) + journal) / GIB


def banner(config: RlConfig, run_dir: Path, checkpoint: Path, *, local: bool) -> dict[str, object]:
    """Lines for the start of a run."""
    plan = actor_plan(config, count_parameters(checkpoint))
    actors = "all in this process" if local else ", ".join(f"{actor.count} x {actor.role}" for actor in plan)
    changed = " ".join(f"{key}={value}" for key, (_, value) in changed_settings(config).items())
    return {
        "run": run_dir,
        "actors": actors,
        "changed": changed or "nothing",
        "stop": "Ctrl-C saves and ends once steps are made; again, or during the start, ends at once",
        "now": f"starting {'one process' if local else f'{sum(actor.count for actor in plan)} actors'}",
    }


def show_result(config: RlConfig, run_dir: Path, checkpoint: Path, terminal: Terminal) -> None:
    """Write the report; print first, last and best rewards, the evaluation before and after, and how many alerts."""
    ceiling = clean_ceiling(checkpoint, config.rollout.sampling.image.guidance_scale)
    notes = NOTES if ceiling else ()
    report = write_report(run_dir, notes=notes, ceiling=ceiling, num_examples=config.evaluation.num_examples)
    terminal.summary({"report": report, "policy": run_dir / "policy"})
    rows = evaluation_rows(run_dir, ceiling)
    if rows:
        head = ("held-out", "before", "after", "gain", "greedy", "ceiling")
        terminal.table("evaluation, 95 % intervals", head, rows)
    warn_of_alerts(run_dir)


def evaluation_rows(run_dir: Path, ceiling: dict[str, float]) -> list[tuple[str, ...]]:
    """One row per measure of the first and last evaluation; none when the run was not evaluated twice."""
    results = list(read_run(run_dir).evaluations.values())
    if len(results) < 2:
        return []
    rows = []
    for measure in find_measures(results[0], results[-1]):
        best = next(
            (ceiling[name] for part in measure.parts if (name := f"{measure.task}/sampled/{part}") in ceiling), None
        )
        before, after, gain = _cells(measure.sampled, with_interval=True)
        rows.append(
            (
                f"{measure.task} {measure.label}",
                before,
                after,
                gain,
                " ->\n".join(_cells(measure.greedy, with_interval=False)[:2]) if measure.greedy else "",
                "" if best is None else f"{best:.3f}",
            )
        )
    return rows


def _cells(gain: Gain | None, *, with_interval: bool) -> tuple[str, str, str]:
    if gain is None:
        return "", "", ""
    before, after = (_estimate(side, with_interval) for side in (gain.before, gain.after))
    return before, after, f"{gain.difference.mean:+.3f}"


def _estimate(estimate: Estimate, with_interval: bool) -> str:
    if estimate.low is None or not with_interval:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f}\n{estimate.low:.3f}..{estimate.high:.3f}"
