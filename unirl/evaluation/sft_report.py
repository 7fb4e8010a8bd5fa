"""report.html of a fine-tuning run: the exam before and after, losses, replies side by side."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from unirl.evaluation.charts import Line, line_chart, smooth
from unirl.evaluation.exam import ExamRow, exam_rows
from unirl.evaluation.page import alerts, charts, timing, write_page
from unirl.evaluation.run_reader import RunRecord, read_run

WINDOW = 10
"""Steps over which curves are averaged."""
_COLORS = {"text": "und", "image": "gen"}


def write_sft_report(run_dir: Path, *, notes: Sequence[str] = (), num_examples: int = 3) -> Path:
    """Write `run_dir`/report.html and return its path.

    Args:
        run_dir: of a fine-tuning run, finished or not.
        notes: what a reader must know to read the numbers right.
        num_examples: replies of each subset shown before and after.

    Raises:
        ValueError: no run directory.
        OSError: the file cannot be written.
    """
    record = read_run(run_dir)
    exams = [json.loads(file.read_text()) for file in sorted(run_dir.glob("evaluations/exam_*.json"))]
    sections = (
        ("Exam", "".join(f"<p class=note>{escape(note)}</p>" for note in notes) + _exam(exams)),
        ("Losses", charts(_losses(record))),
        ("Learner", charts(_learner(record))),
        ("Replies, before and after", _examples(exams, num_examples)),
        ("Where the time went", timing(record)),
        ("Alerts", alerts(record)),
    )
    return write_page(record, sections)


def heldout_series(record: RunRecord, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric over the held-out sequences."""
    found = [(int(f.stem[8:]), json.loads(f.read_text())) for f in record.folder.glob("evaluations/heldout_*.json")]
    return sorted((step, document[name]) for step, document in found if document.get(name) is not None)


def _exam(exams: Sequence[Mapping[str, Any]]) -> str:
    if len(exams) < 2:
        return ""
    body = []
    for subset, rows in groupby(exam_rows(exams[0], exams[-1]), key=lambda row: row.metric.partition("/")[0]):
        body.append(f'<tr class="task"><td colspan="4">{escape(subset)}</td></tr>')
        body += [_row(row) for row in rows]
    return (
        '<div class="scroll"><table><tr><th></th><th>before</th><th>after</th><th>gain</th></tr>'
        f"{''.join(body)}</table></div><p class=note>Means with 95 % intervals: Wilson with the measured spread; gains "
        "of the same prompts alike, in [-1, 1]; where no score changed, the share that could have, either way. Bold: "
        "the interval of the gain does not hold 0.</p>"
    )


def _row(row: ExamRow) -> str:
    name = row.metric.partition("/")[2].replace("_", " ")
    cells = [f"<td>{escape(name)}<small>n = {row.num}</small></td>"]
    cells += [
        f"<td>{mean:.3f}<small>{low:.3f} to {high:.3f}</small></td>" for mean, low, high in (row.before, row.after)
    ]
    mean, low, high = row.gain
    sure = " class=sure" if low > 0 or high < 0 else ""
    cells.append(f"<td{sure}>{mean:+.3f}<small>{low:+.3f} to {high:+.3f}</small></td>")
    return f"<tr>{''.join(cells)}</tr>"


def _losses(record: RunRecord) -> list[str]:
    figures = []
    for what, title, note in (
        ("nats", "Cross-entropy of a target, nats", "among the ids of its own modality"),
        ("accuracy", "Share of targets that were the likeliest", "of their modality"),
    ):
        lines = []
        for modality, color in _COLORS.items():
            name = f"sft/{what}/{modality}"
            lines.append(Line(label=modality, points=smooth(record.series(name), WINDOW), color=color))
            heldout = heldout_series(record, name)
            lines.append(Line(label=f"{modality}, held out", points=heldout, color=color, dashed=True))
        figures.append(line_chart(title, lines, note=f"{note}; means of {WINDOW} steps"))
    return figures


def _learner(record: RunRecord) -> list[str]:
    curves = (
        ("learner/grad_norm", "Gradient norm", "before clipping"),
        ("learner/lr", "Learning rate", ""),
        ("sft/tokens_per_s", "Tokens per second", "of an update"),
        ("sft/data_wait_s", "Waiting for data", "seconds of a step"),
    )
    return [
        line_chart(title, [Line(label=title, points=record.series(name), color="a")], note=note)
        for name, title, note in curves
    ]


def _examples(exams: Sequence[Mapping[str, Any]], number: int) -> str:
    if len(exams) < 2:
        return ""
    after = {item["id"]: item for item in exams[-1]["items"]}
    rows = []
    for subset, items in groupby(exams[0]["items"], key=lambda item: item["subset"]):
        rows.append(f'<tr class="task"><td colspan="3">{escape(subset)}</td></tr>')
        for item in list(items)[:number]:
            shown = (item["prompt"], item["reply"], after[item["id"]]["reply"])
            rows.append("<tr>" + "".join(f"<td>{''.join(map(_segment, part))}</td>" for part in shown) + "</tr>")
    head = "<tr><th>prompt</th><th>before</th><th>after</th></tr>"
    note = "<p class=note>The first prompts of each subset, not chosen by result.</p>"
    return f'{note}<div class="scroll"><table class="replies">{head}{"".join(rows)}</table></div>'


def _segment(segment: Mapping[str, str]) -> str:
    if "image" in segment:
        return f'<img class="pixels" width="80" src="{escape(segment["image"])}" alt="picture">'
    return f"<p>{escape(segment['text'])}</p>"
