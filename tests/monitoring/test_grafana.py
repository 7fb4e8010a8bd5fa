import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from unirl.monitoring.grafana import alert_rules, dashboard, files
from unirl.monitoring.panels import DASHBOARD, RULES
from unirl.monitoring.series import BY_NAME

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
QUERIES = [(panel.title, query, legend) for _, row in DASHBOARD for panel in row for query, legend in panel.queries]
EXPRESSIONS = [*((title, query) for title, query, _ in QUERIES), *((rule.name, rule.value) for rule in RULES)]


@pytest.mark.parametrize("name", files())
def test_generated_files_are_current(name):
    assert (MONITORING / name).read_text() == files()[name], "run python -m unirl.monitoring.grafana"


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_expressions_ask_for_series_that_exist_and_aggregate_them(title, expression):
    for name in re.findall(r"ray_(unirl_\w+)", expression):
        series = BY_NAME.get(name) or BY_NAME[re.sub(r"_(bucket|sum|count)$", "", name)]
        assert (series.kind == "histogram") == (name != series.name), name
    for found in re.finditer("ray_|up{", expression):
        assert any(re.search(r"(sum|max|min) by \([\w, ]+\) $", head) for head in heads(expression, found.start()))


def heads(expression, place):
    """What stands before each bracket that is open at a place."""
    closed = 0
    for index in range(place - 1, -1, -1):
        closed += (expression[index] == ")") - (expression[index] == "(")
        if closed < 0:
            closed = 0
            yield expression[:index]


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES, ids=[title for title, _, _ in QUERIES])
def test_a_legend_names_labels_that_its_query_keeps(title, query, legend):
    kept = set(re.split(r", ", re.findall(r"by \(([\w, ]+)\)", query)[0]))
    assert set(re.findall(r"{{(\w+)}}", legend)) <= kept


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_rules_say_what_is_wrong_and_what_to_do():
    rules = alert_rules()["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "remedy"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        labels = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert labels <= set(re.split(r", ", re.findall(r"by \(([\w, ]+)\)", rule["expr"])[0])), rule["alert"]


def test_containers_mount_what_is_there_and_listen_on_loopback_alone():
    services = yaml.safe_load((MONITORING / "docker-compose.yml").read_text())["services"]
    sources = [mount.split(":/")[0] for service in services.values() for mount in service["volumes"]]
    paths = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", source) for source in sources]
    assert all((MONITORING / path).exists() for path in paths if path.startswith("./"))
    assert len([path for path in paths if path.startswith("./")]) == 5
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://127.0.0.1:9090"
