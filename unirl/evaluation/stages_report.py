"""One page that compares checkpoints, one column each: before anything, after each stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from unirl.evaluation.exam import Estimate
from unirl.evaluation.page import write_html

Means = Mapping[str, Estimate]
"""Mean with its 95 % interval by "group/measure"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A checkpoint and what was measured of it."""

    label: str
    means: Means
    link: str = ""
    """Page about it, relative to this one."""


def write_stages_report(folder: Path, title: str, stages: Sequence[Stage], notes: Sequence[str] = ()) -> Path:
    """Write `folder`/report.html, a row for each measure that any stage has, and return its path.

    Raises:
        OSError: the file cannot be written.
    """
    names = sorted(dict.fromkeys(name for stage in stages for name in stage.means), key=_group)
    head = "".join(f"<th>{_heading(stage)}</th>" for stage in stages)
    rows: list[str] = []
    for group, own in groupby(names, key=_group):
        rows.append(f'<tr class="task"><td colspan="{len(stages) + 1}">{escape(group)}</td></tr>')
        for name in own:
            cells = "".join(_cell(stage.means.get(name)) for stage in stages)
            rows.append(f"<tr><td>{escape(_measure(name))}</td>{cells}</tr>")
    body = (
        f"<header><div><h1>{escape(title)}</h1></div></header><main><section>"
        f"{''.join(f'<p class=note>{escape(note)}</p>' for note in notes)}"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
        "<p class=note>Means with 95 % intervals, each of its own column.</p></section></main>"
    )
    return write_html(folder / "report.html", escape(title), body)


def _group(name: str) -> str:
    return name.partition("/")[0]


def _measure(name: str) -> str:
    return name.partition("/")[2].replace("_", " ")


def _heading(stage: Stage) -> str:
    return f'<a href="{escape(stage.link)}">{escape(stage.label)}</a>' if stage.link else escape(stage.label)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "<td></td>"
    mean, low, high = estimate
    return f"<td>{mean:.3f}<small>{low:.3f} to {high:.3f}</small></td>"
