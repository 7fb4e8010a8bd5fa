"""report.html of any run: one file without scripts or outside references, made from the run directory alone."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from unirl.evaluation.charts import stacked_bar
from unirl.evaluation.run_reader import RunRecord


def write_page(record: RunRecord, sections: Sequence[tuple[str, str]]) -> Path:
    """Write report.html into the run directory and return its path.

    Args:
        record: what the run directory says.
        sections: title and HTML of each part; empty ones are left out.

    Raises:
        OSError: the file cannot be written.
    """
    body = "".join(f"<section><h2>{escape(title)}</h2>{html}</section>" for title, html in sections if html)
    title = escape(str(record.run.get("id", record.folder.name)))
    page = f"{_header(record, title)}<main>{body}</main>{_footer(record)}"
    return write_html(record.folder / "report.html", title, page)


def write_html(path: Path, title: str, body: str) -> Path:
    """Write a whole page at once and return its path.

    Args:
        path: of the file.
        title: escaped.
        body: HTML inside <body>.

    Raises:
        OSError: the file cannot be written.
    """
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body>{body}</body></html>\n",
        encoding="utf-8",
    )
    temporary.replace(path)
    return path


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


def charts(figures: Sequence[str]) -> str:
    """Figures side by side; "" without any."""
    shown = "".join(figures)
    return f'<div class="charts">{shown}</div>' if shown else ""


def timing(record: RunRecord) -> str:
    """Where the time of a step went; "" before the first."""
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


def alerts(record: RunRecord) -> str:
    """What the run warned of; "" for nothing."""
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
