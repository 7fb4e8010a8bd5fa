"""A real Prometheus over docker/monitoring's own files, as a plain process on loopback, and what is asked of it."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from unirl.monitoring.grafana import dashboard
from unirl.monitoring.panels import DASHBOARD, RULES

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docker" / "monitoring"
VARIABLES = {"$__rate_interval": "10s", "$SessionName": ".*", "$run": ".*"}


def find_binary(name):
    """The program, from PATH or where launch/prometheus.sh puts it; without it the test is skipped, or fails in CI."""
    found = shutil.which(name) or shutil.which(name, path=ROOT / ".unirl" / "prometheus" / "usr" / "bin")
    if found is None:
        said = f"no {name} here: the dashboard's PromQL is NOT checked; launch/prometheus.sh fetches it"
        assert os.environ.get("UNIRL_REQUIRE_PROMETHEUS") != "1", said
        pytest.skip(said)
    return found


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def serving(port, name):
    """Whether an exporter serves a series of this name."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            return name in page.read().decode()
    except OSError:
        return False


def wait_until(seen, process, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not seen():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, f"not seen within {timeout_s} s"
        time.sleep(0.2)


class Prometheus:
    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path, **words):
        query = urllib.parse.urlencode(words, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.address}/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{words}: {error.read().decode()[:300]}")

    def up(self):
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def results(self, expression):
        """Labels and value of each series that an expression gives now."""
        found = self.get("api/v1/query", query=filled(expression))["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]


@contextmanager
def prometheus(folder, exporter_port):
    """Prometheus with our configuration, but for the target and the pace."""
    binary, port = find_binary("prometheus"), free_port()
    config = shutil.copytree(FILES, folder / "monitoring")
    (config / "targets" / "local.json").write_text(json.dumps([{"targets": [f"127.0.0.1:{exporter_port}"]}]))
    text = (config / "prometheus.yml").read_text()
    (config / "prometheus.yml").write_text(re.sub(r"(scrape|evaluation)_interval: \w+", r"\1_interval: 1s", text))
    command = [
        binary, f"--config.file={config}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        wait_until(server.up, process, 30.0)
        yield server
    finally:
        process.terminate()
        process.wait(20)


def filled(expression):
    """The expression with Grafana's variables replaced, the longest first."""
    for name, value in sorted(VARIABLES.items(), key=lambda item: -len(item[0])):
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def panel_problems(server, rows=DASHBOARD):
    """What is wrong with panels: no series, NaN alone, or a legend that names a label which the result lacks."""
    for _, panels in rows:
        for panel in panels:
            for query, legend in panel.queries:
                found = server.results(query)
                if not any(math.isfinite(value) for _, value in found):
                    yield f"{panel.title}: no value: {query}"
                named = set(re.findall(r"{{(\w+)}}", legend))
                if lacking := {label for metric, _ in found for label in named - metric.keys()}:
                    yield f"{panel.title}: no label {lacking} in {found[0]}"


def rule_problems(server):
    """What is wrong with rules: no value where nothing is the matter, or a broken expression, or an alarm."""
    for rule in RULES:
        if not any(math.isfinite(value) for _, value in server.results(rule.value)):
            yield f"{rule.name}: no value: {rule.value}"
    loaded = [rule for group in server.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in loaded} == {rule.name for rule in RULES}
    yield from (f"{r['name']}: {r['health']} {r.get('lastError', '')}" for r in loaded if r["health"] != "ok")
    yield from (f"{rule['name']} fires" for rule in loaded if rule["state"] == "firing")


def variable_problems(server):
    """Variables of the dashboard that nothing can be chosen for."""
    for variable in dashboard()["templating"]["list"]:
        if asked := re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]):
            values = server.get(f"api/v1/label/{asked[2]}/values", **{"match[]": filled(asked[1])})
            if not values:
                yield f"no value for {variable['name']}"


def until_sound(server, process, timeout_s=60.0):
    """Ask for everything until nothing is wrong; rates want two scrapes, and a rule its first evaluation."""
    deadline = time.monotonic() + timeout_s
    while True:
        problems = [*panel_problems(server), *rule_problems(server), *variable_problems(server)]
        if not problems or time.monotonic() > deadline or process.poll() is not None:
            return problems
        time.sleep(1.0)
