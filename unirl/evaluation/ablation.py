"""Runs that differ by arm and seed compared: means over seeds and held-out items, and what each arm gains."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unirl.evaluation.charts import Point
from unirl.evaluation.exam import Estimate, metric_names, scores_of
from unirl.evaluation.intervals import crossed_gain, crossed_interval, seed_noise
from unirl.evaluation.run_reader import read_run
from unirl.types import TASKS

Measures = Mapping[str, Mapping[str, float]]
"""What a run measured at one moment: the value of each held-out item, by measure."""

WHOLE = "all items"
"""In place of an item's id where only a mean over all of them was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """The finished runs of an arm."""

    name: str
    by_seed: Mapping[int, Measures]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """An arm by one score."""

    mean: Estimate
    """Over seeds and items, with a 95 % interval that holds the noise of both; that of seeds is taken from all arms."""
    gain: Estimate | None
    """Over the reference, item by item; None for the reference itself."""
    num_seeds: int
    num_items: int
    is_certain: bool
    """Whether the interval of the gain excludes 0; False where nothing is known of the noise."""


def measures_of(run_dir: Path, *, first: bool = False) -> dict[str, dict[str, float]]:
    """What a run measured last, or before its first step: its exam, held-out losses and evaluation, as far as it has.

    Names are "<subset>/<measure>" of an exam, "heldout/<measure>" of losses, "<task>/<mode>/<part>" of an evaluation.
    An item that could not be judged is absent.
    """
    found: dict[str, dict[str, float]] = {}
    if exam := _document(run_dir, "exam", first):
        found |= {name: scores_of(exam, name) for name in metric_names(exam)}
    if losses := _document(run_dir, "heldout", first):
        found |= {f"heldout/{name.removeprefix('sft/')}": {WHOLE: value} for name, value in losses.items()}
    if evaluation := _document(run_dir, "step", first):
        for item in evaluation["items"]:
            for part, value in {"reward": item["reward"], **item["parts"]}.items():
                if value is not None:
                    found.setdefault(f"{item['task']}/{item['mode']}/{part}", {})[item["id"]] = value
    return found


def _document(run_dir: Path, kind: str, first: bool) -> dict[str, Any] | None:
    files = sorted(run_dir.glob(f"evaluations/{kind}_*.json"))
    return json.loads(files[0 if first else -1].read_text()) if files else None


def training_rewards(runs: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, list[Point]]]:
    """Mean reward of each step over an arm's runs, by task and arm; no task where nothing was rewarded.

    Args:
        runs: run directories of each arm; steps that not all of them made are left out.
    """
    records = {arm: [read_run(run) for run in own] for arm, own in runs.items()}
    found: dict[str, dict[str, list[Point]]] = {}
    for task in TASKS:
        for arm, own in records.items():
            series = [dict(record.series(f"reward/{task}")) for record in own]
            steps = sorted(set.intersection(*map(set, series)))
            if steps:
                points = [(float(step), float(np.mean([each[step] for each in series]))) for step in steps]
                found.setdefault(task, {})[arm] = points
    return found


def common_measures(arms: Sequence[Arm]) -> list[str]:
    """The measures that every run of every arm made of the same items, in their order."""
    runs = [measures for arm in arms for measures in arm.by_seed.values()]
    names = runs[0] if runs else {}
    return [
        name for name, items in names.items() if items and all(run.get(name, {}).keys() == items.keys() for run in runs)
    ]


def compare(arms: Sequence[Arm], metrics: Sequence[str], reference: str) -> dict[str, Cell]:
    """Each arm by a score, the mean over the items of its measures.

    Args:
        arms: with one finished run or more each.
        metrics: measures that all runs made of the same items.
        reference: the arm that the others are compared with.

    Raises:
        ValueError: a measure that not all runs have.
    """
    if strange := [name for name in metrics if name not in common_measures(arms)]:
        raise ValueError(
            f"ablation: expected measures that every run made of the same held-out items; got {', '.join(strange)}; "
            f"there are {', '.join(common_measures(arms))}"
        )
    by_arm = {arm.name: np.stack([_items(run, metrics) for run in arm.by_seed.values()]) for arm in arms}
    are_shares = all(values.min() >= 0 and values.max() <= 1 and values.shape[1] > 1 for values in by_arm.values())
    bounds = (0.0, 1.0) if are_shares else None
    noise, base = seed_noise(list(by_arm.values()), bounds), by_arm[reference]
    cells: dict[str, Cell] = {}
    for name, values in by_arm.items():
        mean, gain = float(values.mean()), None
        if name != reference:
            gain = (mean - float(base.mean()), *crossed_gain(values, base, bounds, noise))
        is_known = values.shape[1] > 1 or noise.degrees > 0
        cells[name] = Cell(
            mean=(mean, *crossed_interval(values, bounds, noise)),
            gain=gain,
            num_seeds=len(values),
            num_items=values.shape[1],
            is_certain=is_known and gain is not None and (gain[1] > 0 or gain[2] < 0),
        )
    return cells


def mean_of(measures: Measures, metrics: Sequence[str]) -> float:
    """One run by a score."""
    return float(_items(measures, metrics).mean())


def _items(measures: Measures, metrics: Sequence[str]) -> NDArray[np.float64]:
    """A value for each item [N], the mean of its measures: several of one item are no more items."""
    values: dict[tuple[str, str], list[float]] = {}
    for name in metrics:
        for item, value in measures[name].items():
            values.setdefault((name.partition("/")[0], item), []).append(value)
    return np.array([np.mean(values[key]) for key in sorted(values)], np.float64)
