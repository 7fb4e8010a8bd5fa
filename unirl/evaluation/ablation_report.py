"""One page and one table about an ablation: arms by scores, figures, every single measure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from unirl.evaluation.ablation import Cell
from unirl.evaluation.charts import Line, Point, line_chart, smooth
from unirl.evaluation.exam import Estimate
from unirl.evaluation.page import charts, write_html

COLORS = ("a", "b", "c", "und", "gen")
"""Of the style sheet; arms beyond them are dashed."""
WINDOW = 5
"""Steps of a moving mean."""
Table = Mapping[str, Mapping[str, Cell]]
"""Score or measure -> arm -> what was found."""

HOW = (
    "Means over seeds and held-out items, with 95 % intervals that hold the noise of both; that of seeds is taken from "
    "all arms. Below them the gain over {reference}, item by item. Bold: the interval of the gain does not hold 0."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A score over what some arms have more or less of."""

    title: str
    x_label: str
    points: Sequence[tuple[float, Estimate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """What an ablation found."""

    name: str
    arms: Sequence[str]
    reference: str
    scores: Table
    measures: Table
    before: Mapping[str, float]
    """Each score of the policy that all arms start from."""
    curves: Sequence[Curve]
    training: Mapping[str, Mapping[str, Sequence[Point]]]
    """(step, mean reward over the runs) by task and arm."""
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file or for stdout."""
        return asdict(self)


def write_ablation_report(folder: Path, ablation: Ablation) -> Path:
    """Write `folder`/report.html and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    body = [f"<header><div><h1>{escape(ablation.name)}</h1></div></header><main><section>"]
    body += [f"<p class=note>{escape(note)}</p>" for note in ablation.notes]
    body += [_table(ablation, ablation.scores), f"<p class=note>{escape(HOW.format(reference=ablation.reference))}</p>"]
    body += ["</section>"]
    if ablation.curves:
        body += [f"<section><h2>Curves</h2>{charts(list(map(_figure, ablation.curves)))}</section>"]
    if ablation.training:
        figures = [_training_figure(task, arms) for task, arms in ablation.training.items()]
        body += [f"<section><h2>Rewards in training</h2>{charts(figures)}</section>"]
    body += ["<section><h2>Every measure</h2>"]
    for group, names in groupby(ablation.measures, key=lambda name: name.partition("/")[0]):
        own = {name.partition("/")[2].replace("_", " "): ablation.measures[name] for name in names}
        body.append(f"<details><summary>{escape(group)}</summary>{_table(ablation, own)}</details>")
    return write_html(folder / "report.html", escape(ablation.name), "".join([*body, "</section></main>"]))


def _table(ablation: Ablation, table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table)
    rows = []
    if table is ablation.scores and ablation.before:
        cells = "".join(f"<td>{ablation.before[name]:.3f}</td>" for name in table)
        rows.append(f"<tr><td>before training</td>{cells}</tr>")
    for arm in ablation.arms:
        cells = "".join(_cell(table[name].get(arm)) for name in table)
        rows.append(f"<tr><td>{escape(arm)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    mean, low, high = cell.mean
    gain = "<small>reference</small>"
    if cell.gain:
        gain = "<small>{:+.3f}, {:+.3f} to {:+.3f}</small>".format(*cell.gain)
    sure = " class=sure" if cell.is_certain else ""
    return f"<td{sure}>{mean:.3f}<small>{low:.3f} to {high:.3f}</small>{gain}</td>"


def _training_figure(task: str, arms: Mapping[str, Sequence[Point]]) -> str:
    lines = [
        Line(label=arm, points=smooth(points, WINDOW), color=COLORS[index % len(COLORS)], dashed=index >= len(COLORS))
        for index, (arm, points) in enumerate(arms.items())
    ]
    return line_chart(task, lines, note=f"means over runs and up to {WINDOW} steps")


def _figure(curve: Curve) -> str:
    line = Line(
        label=curve.title,
        points=[(x, mean) for x, (mean, _, _) in curve.points],
        color="a",
        band=[(x, low, high) for x, (_, low, high) in curve.points],
    )
    return line_chart(curve.title, [line], note=f"over {curve.x_label}; 95 % intervals", x_label="")
