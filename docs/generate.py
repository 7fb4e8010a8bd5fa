"""Reference pages that are made from the code: settings, commands, and what Prometheus and Grafana show."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import typer
from typer.testing import CliRunner

from unirl.cli import app
from unirl.config import AblationConfig, GenerateConfig, PairConfig, RlConfig, SftConfig
from unirl.config_keys import Setting, list_settings
from unirl.monitoring.panels import DASHBOARD, RULES
from unirl.monitoring.series import PREFIX, SERIES

WIDTH = 96


def write_pages(folder: Path) -> None:
    """Write the pages into `folder`, leaving one that is current untouched."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = (
        ("configuration.md", configuration_page()),
        ("cli.md", cli_page()),
        ("prometheus.md", prometheus_page()),
    )
    for name, lines in pages:
        text = "\n".join(lines) + "\n"
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def configuration_page() -> Iterator[str]:
    """Every setting of every job, by group."""
    yield "# All settings"
    yield "\n`unirl config keys --docs` prints the same. How settings are given: [](../../configuration.md).\n"
    jobs = (
        ("unirl train and eval", RlConfig),
        ("unirl sft", SftConfig),
        ("unirl generate", GenerateConfig),
        ("unirl pair make", PairConfig),
        ("unirl ablate", AblationConfig),
    )
    for title, schema in jobs:
        yield f"## {title}\n"
        for group, settings in groupby(list_settings(schema), key=lambda setting: setting.key.rpartition(".")[0]):
            if group:
                yield f"### {group}\n"
            for setting in settings:
                yield from _setting(setting)


def _setting(setting: Setting) -> Iterator[str]:
    rule = f" It {setting.rule}." if setting.rule else ""
    yield f"`{setting.key}`"
    yield f": {setting.doc}{rule}  \n  {setting.type}, default `{setting.default}`\n"


def cli_page() -> Iterator[str]:
    """The help of every command."""
    yield "# Commands\n"
    group = typer.main.get_command(app)
    yield from _help([])
    for name, command in group.commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        yield f"## unirl {name}\n"
        inner = list(getattr(command, "commands", {}))
        yield from _help([name])
        for sub in inner:
            yield f"### unirl {name} {sub}\n"
            yield from _help([name, sub])


def prometheus_page() -> Iterator[str]:
    """Series, panels and alert rules."""
    yield "# Series, panels and alerts\n"
    yield "How to get them: [](../../monitoring.md). Every series also has the label `run`.\n"
    yield "| series | kind | labels | fed by | meaning |\n|---|---|---|---|---|"
    for series in SERIES:
        fed = f"`{series.source}`".replace("|", "\\|") if series.source else ""
        yield f"| `{PREFIX}{series.name}` | {series.kind} | {', '.join(series.labels)} | {fed} | {series.meaning} |"
    yield "\n## Panels\n\n| row | panel | meaning |\n|---|---|---|"
    for title, row in DASHBOARD:
        yield from (f"| {title} | {panel.title} | {panel.meaning} |" for panel in row)
    yield "\n## Alerts\n\n| alert | severity | fires when | for | what to do |\n|---|---|---|---|---|"
    for rule in RULES:
        fires = f"`{rule.value} {rule.bound}`"
        yield f"| {rule.name} | {rule.severity} | {fires} | {rule.lasting} | {rule.remedy} |"


def _help(path: list[str]) -> Iterator[str]:
    shown = CliRunner().invoke(app, [*path, "--help"], prog_name="unirl", terminal_width=WIDTH)
    yield f"```text\n{shown.output.strip()}\n```\n"
