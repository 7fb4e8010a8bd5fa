"""report.html of a run: one file without scripts or outside references, made from the run directory alone."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from unirl.evaluation.charts import Line, histogram, line_chart, smooth, stacked_bar
from unirl.evaluation.evaluate import Estimate, EvaluationResult, Measure, find_measures
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
        ("Rewards while training", _charts(_reward_charts(record))),
        ("Held-out pairs, before and after", examples and _examples_note(last) + examples),
        ("By category", _categories(first, last)),
        ("Policy and learner", _charts(_policy_charts(record))),
        ("Pairs", _charts([_weights(record)])),
        ("Where the time went", _timing(record)),
        ("Alerts", _alerts(record)),
    )
    body = "".join(f"<section><h2>{escape(title)}</h2>{html}</section>" for title, html in sections if html)
    title = escape(str(record.run.get("id", run_dir.name)))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body>{_header(record, title)}<main>{body}</main>{_footer(record)}</body>"
        "</html>\n"
    )
    path = run_dir / "report.html"
    temporary = run_dir / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _first_and_last(record: RunRecord) -> tuple[EvaluationResult | None, EvaluationResult | None]:
    """The first evaluation is None when there is only one."""
    results = list(record.evaluations.values())
    return (results[0] if len(results) > 1 else None), (results[-1] if results else None)


def _header(record: RunRecord, title: str) -> str:
    run = record.run
    status = str(run.get("status", "unknown"))
    steps = record.metrics[-1]["step"] if record.metrics else 0
    seconds = sum(value for _, value in record.series("time/step_s"))
    facts = {
        "steps": steps,
        "training time": f"{seconds / 60:.1f} min",
        "started": run.get("created"),
        "starts": run.get("attempt", 0) + 1,
        "host": run.get("host"),
        "commit": str(run.get("git_commit") or "unknown")[:12],
        **(run.get("versions") or {}),
    }
    items = "".join(f"<li>{escape(str(name))} <b>{escape(str(fact))}</b></li>" for name, fact in facts.items())
    reason = f"<p class=note>{escape(str(run['reason']))}</p>" if run.get("reason") else ""
    changed = run.get("changed") or {}
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(default))}</td><td>{escape(str(value))}</td></tr>"
        for key, (default, value) in changed.items()
    )
    table = f"<table><tr><th>setting</th><th>default</th><th>this run</th></tr>{rows}</table>" if rows else ""
    shown = " open" if len(changed) <= 12 else ""
    settings = f"<details{shown}><summary>{len(changed)} settings differ from the defaults</summary>{table}</details>"
    badge = f'<span class="status {escape(status)}">{escape(status)}</span>'
    return f'<header><div><h1>{title}</h1>{badge}</div>{reason}<ul class="facts">{items}</ul>{settings}</header>'


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
    return _charts([line_chart("Held-out reward by step", lines)])


def _charts(figures: Sequence[str]) -> str:
    shown = "".join(figures)
    return f'<div class="charts">{shown}</div>' if shown else ""


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


def _timing(record: RunRecord) -> str:
    if not record.metrics:
        return ""
    phases = sorted({name for line in record.metrics for name in line if name.startswith("time/")} - {"time/step_s"})
    means = {
        name.removeprefix("time/").removesuffix("_s"): sum(value for _, value in record.series(name))
        / len(record.metrics)
        for name in phases
    }
    rates = {name: [value for _, value in record.series(f"rollout/{name}_per_s")] for name in ("tokens", "images")}
    speed = "; ".join(f"{sum(v) / len(v):.0f} {name}/s" for name, v in rates.items() if v)
    note = f"<p class=note>Mean seconds per step. Rollout: {speed}.</p>" if speed else ""
    return note + stacked_bar(means, "s")


def _alerts(record: RunRecord) -> str:
    alerts = [event for event in record.events if event.get("kind") in ("alert", "stall", "actor_down")]
    rows = "".join(
        f"<li>step {escape(str(event.get('step', '-')))}: {escape(str(event.get('message')))}</li>"
        for event in alerts[:50]
    )
    more = f"<p class=note>and {len(alerts) - 50} more in events.jsonl</p>" if len(alerts) > 50 else ""
    return f"<details><summary>{len(alerts)} alerts</summary><ul>{rows}</ul>{more}</details>" if alerts else ""


def _footer(record: RunRecord) -> str:
    bad = f" {record.num_bad_lines} unreadable lines were skipped." if record.num_bad_lines else ""
    return f'<footer class="note">Made from {escape(record.folder.resolve().name)}/ alone.{bad}</footer>'
