"""Seconds of a training step by phase, in every mode in which sampling and learning may run beside each other.

Each mode is a short run of its own through `unirl train`'s code, records included. Run it by `unirl bench step`.
"""

import contextlib
import json
import logging
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from unirl.benchmarks.report import Goal, Report, Row, Table
from unirl.config import RlConfig
from unirl.config_rules import ConfigError, find_problems
from unirl.jobs import rl

SYNCHRONOUS = "synchronous"
LARGER = 4
MOST_OUTSIDE, MOST_OVER = 0.03, 1.1
"""Goals: share of a step outside rollout, reward and update; an overlapped step to the longer of its two sides."""
log = logging.getLogger(__name__)


def measure_step(config: RlConfig, *, steps: int, local: bool) -> Report:
    """A run of `steps` timed steps in each mode that the configuration knows; the first and last are left out.

    A synchronous run with `LARGER` times the pairs shows what of a step is a fixed cost. With `local` there is one run,
    since a process holds one vLLM engine's process group.

    Raises:
        ConfigError: a mode's settings contradict the others.
    """
    rows: list[Row] = []
    goals: list[Goal] = []
    larger = replace(config, rollout=replace(config.rollout, pairs_per_step=LARGER * config.rollout.pairs_per_step))
    runs = [(SYNCHRONOUS, config), (SYNCHRONOUS, larger), *((mode, config) for mode in modes_of(config)[1:])]
    for mode, own in runs[:1] if local else runs:
        log.info("%d steps of %d pairs, %s", steps + 2, own.rollout.pairs_per_step, mode)
        row = _row(mode, own, _lines(_in_mode(own, mode, steps + 2), local=local))
        rows.append(row)
        if mode == SYNCHRONOUS:
            text = f"share of a step outside rollout, reward and update, {own.rollout.pairs_per_step} pairs"
            goals.append(Goal(text=text, wanted=MOST_OUTSIDE, got=float(row["outside"] or 0), at_most=True))
        else:
            got = float(row["step to the longer side"] or 0)
            goals.append(Goal(text=f"{mode} step to max(rollout, learn)", wanted=MOST_OVER, got=got, at_most=True))
    limits = [
        "A synchronous step is the sum of its phases, so its share outside is what batches, publishing and records "
        "take; rewards are scored while later groups are still being sampled. Publishing hardly grows with the pairs: "
        "it is the time in which every engine takes over and repacks its weights.",
        "An overlapped step can be no shorter than the longer of rollout and learning (batch, update, publish), and "
        "reaches it only where each side has cores of its own: rollout workers, rewards and the learner share this "
        "machine's.",
    ]
    rollout, learner = config.rollout, config.learner
    title = (
        f"{rollout.num_understanding} answers and {rollout.num_generation} pictures a pair, "
        f"{learner.num_ranks} rank(s), seconds a step"
    )
    tables = [Table(title=title, rows=rows)]
    return Report(name="step", command="unirl bench step", tables=tables, goals=goals, limits=limits)


def modes_of(config: RlConfig) -> tuple[str, ...]:
    """The modes of overlap that the configuration knows, synchronous first."""
    overlap: Any = getattr(config, "overlap", None)
    return (SYNCHRONOUS,) if overlap is None else get_args(get_type_hints(type(overlap))["mode"])


def _in_mode(config: RlConfig, mode: str, num_steps: int) -> RlConfig:
    changed: dict[str, Any] = {
        "train": replace(config.train, num_steps=num_steps, save_every=0, name="bench"),
        "evaluation": replace(config.evaluation, enabled=False),
    }
    overlap: Any = getattr(config, "overlap", None)
    if overlap is not None:
        changed["overlap"] = replace(overlap, mode=mode)
    made = replace(config, **changed)
    if problems := find_problems(made):
        raise ConfigError(problems)
    return made


def _lines(config: RlConfig, *, local: bool) -> list[dict[str, float]]:
    """The metrics of a run's steps."""
    with tempfile.TemporaryDirectory(prefix="unirl-bench-") as folder, contextlib.redirect_stdout(sys.stderr):
        run_dir = Path(folder) / "run"
        rl.main(replace(config, train=replace(config.train, run_dir=str(run_dir))), local=local)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _row(mode: str, config: RlConfig, lines: list[dict[str, float]]) -> Row:
    """Medians over the steps that have a neighbour on either side."""
    walls = [line["time"] - before["time"] for before, line in pairwise(lines[:-1])]
    timed = lines[1:-1]

    def median(phase: str) -> float:
        return float(np.median([line.get(f"time/{phase}_s", 0.0) for line in timed]))

    sides = [
        max(line["time/rollout_s"], sum(line.get(f"time/{phase}_s", 0.0) for phase in ("batch", "update", "publish")))
        for line in timed
    ]
    busy = [line["time/rollout_s"] + line["time/update_s"] for line in timed]
    row: Row = {"mode": mode, "pairs a step": config.rollout.pairs_per_step, "step": float(np.median(walls))}
    row |= {phase: median(phase) for phase in ("pairs", "rollout", "batch", "update", "publish", "wait")}
    outside = None if mode != SYNCHRONOUS else float(np.median(1 - np.array(busy) / np.array(walls)))
    row["outside"] = outside
    row["step to the longer side"] = float(np.median(np.array(walls) / np.array(sides)))
    return row
