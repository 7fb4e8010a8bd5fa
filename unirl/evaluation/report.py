"""report.html of a run: one file without scripts or outside references, made from the run directory alone."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from unirl.evaluation.charts import Line, histogram, line_chart, smooth
from unirl.evaluation.evaluate import Estimate, EvaluationResult, Measure, find_measures
from unirl.evaluation.page import alerts, charts, timing, write_page
from unirl.evaluation.run_reader import RunRecord, read_run
from unirl.evaluation.side_by_side import side_by_side
from unirl.types import Task

WINDOW = 5
"""Steps over which reward curves are averaged."""
_COLORS: dict[Task, str] = {"understanding": "und", "generation": "gen"}

Curve = tuple[str, str, str]
"""(metric, label, colour class)."""

POLICY_CHARTS: tuple[tuple[str, str, tuple[Curve, ...]], ...] = (
    (
        "Ratio of new to old probability",
        "1 when the learner sees what the sampler saw",
        (
            ("policy/ratio_mean", "mean", "a"),
            ("policy/ratio_max", "largest", "b"),
            ("policy/ratio_min", "least", "c"),
        ),
    ),
    ("Clipped tokens", "share of tokens", (("policy/clip_fraction", "clipped", "a"),)),
    (
        "Entropy of the next token",
        "nats",
        (("policy/entropy/text", "text", "und"), ("policy/entropy/image", "image", "gen")),
    ),
    ("Gradient norm", "before clipping", (("learner/grad_norm", "norm", "a"),)),
    (
        "Sampler against learner",
        "largest difference of log-probabilities before the update, nats",
        (("policy/logprob_gap_max", "gap", "a"),),
    ),
    (
        "KL divergence",
        "nats per token",
        (("policy/kl", "from the sampling policy", "a"), ("policy/kl_reference", "from the reference", "b")),
    ),
    ("Mean size of the advantages", "", (("advantage/abs_mean", "advantage", "a"),)),
)
"""Every figure of the section on the policy: title, note, curves."""


def write_report(
    run_dir: Path,
    *,
    notes: Sequence[str] = (),
    ceiling: Mapping[str, float] | None = None,
    num_examples: int = 10,
) -> Path:
    """Write `run_dir`/report.html and return its path.

    Args:
        run_dir: a run directory, finished or not.
        notes: what a reader must know to read the numbers right; shown above them.
        ceiling: best value known to be reachable, by measure such as "generation/sampled/lab_verifier/exact".
        num_examples: held-out pairs shown before and after.

    Raises:
        ValueError: no run directory.
        OSError: the file cannot be written.
    """
    record = read_run(run_dir)
    first, last = _first_and_last(record)
    examples = "" if last is None else side_by_side(run_dir, first, last, num_examples)
    sections = (
        ("Held-out evaluation", _notes(notes) + _evaluation(record, first, last, ceiling or {})),
        ("Rewards while training", charts(_reward_charts(record))),
        ("Held-out pairs, before and after", examples and _examples_note(last) + examples),
        ("By category", _categories(first, last)),
        ("Policy and learner", charts(_policy_charts(record))),
        ("Pairs", charts([_weights(record)])),
        ("Where the time went", timing(record)),
        ("Alerts", alerts(record)),
    )
    return write_page(record, sections)


def _first_and_last(record: RunRecord) -> tuple[EvaluationResult | None, EvaluationResult | None]:
    """The first evaluation is None when there is only one."""
    results = list(record.evaluations.values())
    return (results[0] if len(results) > 1 else None), (results[-1] if results else None)


def _notes(notes: Sequence[str]) -> str:
    return f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>' if notes else ""


def _evaluation(
    record: RunRecord, first: EvaluationResult | None, last: EvaluationResult | None, ceiling: Mapping[str, float]
) -> str:
    if last is None:
        return "<p>This run was not evaluated.</p>"
    compared = first is not None
    head = ["", *(["before", "after", "gain"] if compared else ["value"])]
    head += ["greedy before", "greedy after"] if compared else ["greedy"]
    head += ["ceiling"] if ceiling else []
    rows = []
    for task, measures in groupby(find_measures(first, last), key=lambda measure: measure.task):
        rows.append(f'<tr class="task"><td colspan="{len(head)}">{task}</td></tr>')
        rows += [_measure_row(measure, ceiling, compared) for measure in measures]
    columns = "".join(f"<th>{word}</th>" for word in head)
    unjudged = sum(result.num_unjudged for result in (first, last) if result)
    warning = f'<p class="alert">{unjudged} completions could not be judged and are left out.</p>' if unjudged else ""
    return (
        f'<div class="scroll"><table><tr>{columns}</tr>{"".join(rows)}</table></div>'
        "<p class=note>Means with 95 % intervals. Measures in [0, 1]: Wilson where right or wrong; else, and for gains "
        "(the same items compared), Wilson with the measured spread and Student t for the normal quantile, so that no "
        "interval leaves the range; none where all values are equal. Other measures: Student t. “By prompt” takes "
        "items with the same prompt as one draw (cluster bootstrap): where prompts repeat, trust this one. Bold gains: "
        f"no interval holds 0.</p>{warning}{_evaluation_curves(record)}"
    )


def _measure_row(measure: Measure, ceiling: Mapping[str, float], compared: bool) -> str:
    sampled, greedy = measure.sampled, measure.greedy
    names = " = ".join(part for part in measure.parts if part != measure.label)
    one = measure.any.after
    prompts = f", {one.num_clusters} prompts" if one.clustered_low is not None else ""
    cells = [f"<td>{escape(measure.label)}<small>{escape(names)}</small><small>n = {one.num}{prompts}</small></td>"]
    if compared:
        cells += [_cell(sampled and sampled.before), _cell(sampled and sampled.after)]
        cells += [_gain_cell(sampled and sampled.difference)]
        cells.append(_cell(greedy and greedy.before, by_prompt=False))
    else:
        cells.append(_cell(sampled and sampled.after))
    cells.append(_cell(greedy and greedy.after, by_prompt=False))
    if ceiling:
        known = (ceiling.get(f"{measure.task}/sampled/{part}") for part in measure.parts)
        best = next((value for value in known if value is not None), None)
        cells.append(f"<td>{'' if best is None else f'{best:.3f}'}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _cell(estimate: Estimate | None, *, by_prompt: bool = True) -> str:
    return "<td></td>" if estimate is None else f"<td>{estimate.mean:.3f}{_interval(estimate, '.3f', by_prompt)}</td>"


def _gain_cell(estimate: Estimate | None) -> str:
    """Bold where every interval excludes 0; whether more is better depends on the measure."""
    if estimate is None:
        return "<td></td>"
    shown = ((estimate.low, estimate.high), (estimate.clustered_low, estimate.clustered_high))
    ends = [(low, high) for low, high in shown if low is not None and high is not None]
    sure = ends and all(low > 0 or high < 0 for low, high in ends)
    return f"<td{' class=sure' if sure else ''}>{estimate.mean:+.3f}{_interval(estimate, '+.3f', by_prompt=True)}</td>"


def _interval(estimate: Estimate, form: str, by_prompt: bool) -> str:
    text = "" if estimate.low is None else f"<small>{estimate.low:{form}} to {estimate.high:{form}}</small>"
    if by_prompt and estimate.clustered_low is not None:
        text += f"<small>by prompt<br>{estimate.clustered_low:{form}} to {estimate.clustered_high:{form}}</small>"
    return text


def _evaluation_curves(record: RunRecord) -> str:
    if len(record.evaluations) < 3:
        return ""
    lines = []
    for task, color in _COLORS.items():
        for mode in ("sampled", "greedy"):
            found = [(step, r.estimates.get(f"{task}/{mode}/reward")) for step, r in record.evaluations.items()]
            points = [(step, estimate.mean) for step, estimate in found if estimate]
            lines.append(Line(label=f"{task}, {mode}", points=points, color=color, dashed=mode == "greedy"))
    return charts([line_chart("Held-out reward by step", lines)])


def _reward_charts(record: RunRecord) -> list[str]:
    figures = []
    for task, color in _COLORS.items():
        mean = smooth(record.series(f"reward/{task}"), WINDOW)
        spread = dict(smooth(record.series(f"reward/{task}/group_std"), WINDOW))
        band = [(x, y - spread[x], y + spread[x]) for x, y in mean if x in spread]
        kinds = [(kind, smooth(record.series(f"reward/{task}/{kind}"), WINDOW)) for kind in ("aligned", "retrieved")]
        lines = [
            Line(label=f"{kind} pairs", points=points, color=color, dashed=kind == "retrieved", band=band)
            for (kind, points), band in zip(kinds, (band, ()), strict=True)
        ]
        note = f"means of {WINDOW} steps; shaded: spread inside a group (± one standard deviation)"
        figures.append(line_chart(f"Reward, {task}", lines, note=note))
    flat = [
        Line(label=task, points=smooth(record.series(f"reward/{task}/zero_variance_fraction"), WINDOW), color=color)
        for task, color in _COLORS.items()
    ]
    note = f"share of groups whose rewards are all equal, means of {WINDOW} steps"
    return [*figures, line_chart("Groups that teach nothing", flat, note=note, y_range=(0.0, 1.0))]


def _policy_charts(record: RunRecord) -> list[str]:
    return [
        line_chart(
            title,
            [Line(label=label, points=record.series(name), color=color) for name, label, color in curves],
            note=note,
        )
        for title, note, curves in POLICY_CHARTS
    ]


def _categories(first: EvaluationResult | None, last: EvaluationResult | None) -> str:
    """Sampled means by category, one table per task, of the measures that the evaluation table shows."""
    if last is None:
        return ""
    tables = []
    for task, group in groupby(find_measures(first, last), key=lambda measure: measure.task):
        measures = [measure for measure in group if measure.sampled]
        rows = []
        for category, estimates in last.categories.items():
            earlier = first.categories.get(category, {}) if first else {}
            names = [f"{task}/sampled/{measure.parts[-1]}" for measure in measures]
            cells = [_change(earlier.get(name), estimates[name]) for name in names if name in estimates]
            if cells:
                num = estimates[names[0]].num
                rows.append(f"<tr><td>{escape(category)}<small>n = {num}</small></td>{''.join(cells)}</tr>")
        head = "".join(f"<th>{escape(measure.label)}</th>" for measure in measures)
        if rows:
            tables.append(f"<table><tr><th>{escape(task)}</th>{head}</tr>{''.join(rows)}</table>")
    return f'<div class="scroll tables">{"".join(tables)}</div>' if tables else ""


def _change(before: Estimate | None, after: Estimate) -> str:
    earlier = f"{before.mean:.2f} → " if before else ""
    interval = "" if after.low is None else f"<small>{after.low:.2f} to {after.high:.2f}</small>"
    return f"<td>{earlier}<b>{after.mean:.2f}</b>{interval}</td>"


def _examples_note(last: EvaluationResult | None) -> str:
    num = 0 if last is None else sum(item.mode == "sampled" for item in last.items)
    return (
        f"<p class=note>Evenly spaced among the {num} held-out items, not chosen by result; sampled as in training, "
        "with the same seed before and after.</p>"
    )


def _weights(record: RunRecord) -> str:
    weights: dict[str, dict[str, float]] = {"aligned": {}, "retrieved": {}}
    for line in record.used_pairs:
        for pair in line.get("pairs", ()):
            weights.setdefault(str(pair["kind"]), {})[str(pair["pair_id"])] = float(pair["weight"])
    colors = {"aligned": "a", "retrieved": "b"}
    groups = {kind: (colors.get(kind, "c"), list(values.values())) for kind, values in weights.items() if values}
    counts = ", ".join(f"{len(values)} {kind}" for kind, (_, values) in groups.items())
    return histogram("Weights of the pairs used", groups, "weight", note=f"number of distinct pairs: {counts}")
