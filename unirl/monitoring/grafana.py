"""Writes docker/monitoring's generated files from the tables in `panels.py`: the Grafana dashboard and the alert rules.

`python -m unirl.monitoring.grafana [FOLDER]`; FOLDER is docker/monitoring by default.
"""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from unirl.monitoring.panels import DASHBOARD, RULES, Panel

WIDTH, HEIGHT = 8, 8
"""Of a panel, of 24 columns."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    numbers, y = count(1), 0
    for title, row in DASHBOARD:
        position = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append({"id": next(numbers), "type": "row", "title": title, "gridPos": position, "panels": []})
        y += 1
        for place, panel in enumerate(row):
            x, down = place % 3 * WIDTH, place // 3 * HEIGHT
            panels.append(_panel(panel, next(numbers), {"h": HEIGHT, "w": WIDTH, "x": x, "y": y + down}))
        y += -(-len(row) // 3) * HEIGHT
    return {
        "uid": "unirl",
        "title": "unirl",
        "description": "Made by python -m unirl.monitoring.grafana; change unirl/monitoring/panels.py instead.",
        "tags": ["unirl"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def alert_rules() -> dict[str, Any]:
    """The alert rules as Prometheus reads them."""
    rules = [
        {
            "alert": rule.name,
            "expr": f"({rule.value}) {rule.bound}",
            "for": rule.lasting,
            "labels": {"severity": rule.severity},
            "annotations": {"summary": rule.summary, "remedy": rule.remedy},
        }
        for rule in RULES
    ]
    return {"groups": [{"name": "unirl", "rules": rules}]}


def files() -> dict[str, str]:
    """Text of every generated file by its path below docker/monitoring."""
    head = "# Made by python -m unirl.monitoring.grafana; change unirl/monitoring/panels.py instead.\n"
    return {
        "grafana/dashboards/unirl.json": json.dumps(dashboard(), indent=1) + "\n",
        "alerts.yml": head + yaml.safe_dump(alert_rules(), sort_keys=False, width=110),
    }


def _variables() -> list[dict[str, Any]]:
    chosen = {"type": "query", "datasource": _SOURCE, "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2}
    step = "ray_unirl_step"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {"name": "SessionName", "label": "Ray session", "query": f"label_values({step}, SessionName)"} | chosen,
        {"name": "run", "query": f'label_values({step}{{SessionName=~"$SessionName"}}, run)'} | chosen,
    ]


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    stacking = {"stacking": {"mode": "normal"}, "fillOpacity": 40} if panel.stacked else {}
    shown = {
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"},
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": _SOURCE,
        "gridPos": position,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {"spanNulls": True, **stacking}},
            "overrides": [],
        },
        "options": shown[panel.kind],
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def write_files(folder: Path) -> None:
    """Write every generated file."""
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docker/monitoring"))
