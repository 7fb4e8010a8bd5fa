"""The dashboard before a long run: how soon its first page can be drawn, how long a pair takes, what a poll weighs.

The real server runs in a process of its own; the requests are those that the page makes, as many at once as a browser.
"""

import gzip
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
import psutil

from unirl.benchmarks.dashboard_run import METRICS, STEP_S, LongRun, metrics_line, write_long_run
from unirl.benchmarks.report import Goal, Report, Row, Table
from unirl.monitoring.durable_files import encode_line

READY_S, SWITCH_S, POLL_BYTES, RSS_MB = 3.0, 0.3, 5000.0, 120.0
BROWSER_CONNECTIONS = 6
START_TIMEOUT_S = 120.0

Browser = Callable[[str, Path], tuple[list[Row], list[Goal]]]
"""Measures the page in a real browser: given its address and the run directory, the rows of a table, and goals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardBench:
    """What is measured."""

    run: LongRun = field(default_factory=LongRun)
    num_switches: int = 30
    """Pairs that are looked at."""
    num_polls: int = 10
    """Steps that are added while the page is open."""
    browser: Browser | None = None


@dataclass(slots=True)
class _Client:
    """Requests as a browser makes them."""

    host: str
    num_bytes: int = 0

    def get(self, path: str, **query: Any) -> Any:
        """The JSON at a path, or the bytes of a picture; counts the bytes on the wire, headers left out."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            address = f"/{path}" + (f"?{urlencode(query)}" if query else "")
            connection.request("GET", address, headers={"Accept-Encoding": "gzip"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, (address, answer.status, body[:200])
        self.num_bytes += len(body)
        if answer.headers.get_content_type() != "application/json":
            return body
        return json.loads(gzip.decompress(body) if answer.getheader("Content-Encoding") == "gzip" else body)

    def together(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
        """Several at once."""
        with ThreadPoolExecutor(BROWSER_CONNECTIONS) as pool:
            return list(pool.map(lambda one: self.get(one[0], **one[1]), asked))


def measure_dashboard(bench: DashboardBench) -> Report:
    """Seconds, bytes and memory of the dashboard before a synthetic run."""
    with tempfile.TemporaryDirectory(prefix="unirl-dashboard-") as folder:
        run_dir = write_long_run(Path(folder) / "long", bench.run, time.time())
        megabytes = sum(file.stat().st_size for file in run_dir.glob("**/*.jsonl")) / 1e6
        with _server(Path(folder)) as (server, host, start_s):
            client = _Client(host)
            ready = _first_page(client)
            first_history_s = _seconds(lambda: client.get("api/run/long/pair_history", pair_id="of the first"))
            switches, histories = _switches(client, bench.num_switches)
            polls, poll_bytes = _polls(client, run_dir, bench)
            search_s = _seconds(lambda: client.get("api/run/long/pairs", text="number 77 ?"))
            rows, goals = bench.browser(f"http://{host}/", run_dir) if bench.browser else ([], [])
            memory = server.memory_info().rss / 1e6
    figures: list[Row] = [
        {"figure": "start of the server, s", "value": start_s},
        {"figure": "first page: all its requests, s", "value": ready[0]},
        {"figure": "first page, kB", "value": ready[1] / 1000},
        {"figure": "pair switch with its pictures, median, s", "value": float(np.median(switches))},
        {"figure": "pair switch with its pictures, longest, s", "value": max(switches)},
        {"figure": "history of a pair, the first after the start, s", "value": first_history_s},
        {"figure": "history of a pair, longest of the others, s", "value": max(histories)},
        {"figure": "poll with a new step, median, s", "value": float(np.median(polls))},
        {"figure": "poll with a new step, most bytes", "value": max(poll_bytes)},
        {"figure": "search for a text in all pairs, s", "value": search_s},
        {"figure": "memory of the server at the end, MB", "value": memory},
    ]
    size = bench.run
    return Report(
        name="dashboard",
        command="unirl bench dashboard",
        tables=[
            Table(
                title=f"{size.num_steps} steps, {len(METRICS)} metrics, {size.num_pairs} shown pairs, "
                f"{megabytes:.0f} MB of lines",
                rows=figures,
            ),
            *([Table(title="in a browser", rows=rows)] if rows else []),
        ],
        goals=[
            Goal(text="first page ready, s", wanted=READY_S, got=ready[0], at_most=True),
            Goal(text="pair switch, longest, s", wanted=SWITCH_S, got=max(switches), at_most=True),
            Goal(text="poll with a new step, bytes", wanted=POLL_BYTES, got=max(poll_bytes), at_most=True),
            Goal(text="memory of the server, MB", wanted=RSS_MB, got=memory, at_most=True),
            *goals,
        ],
        limits=[
            "Figures of the first page and of pairs are of the requests that the page makes, six at once, answers "
            "unpacked and parsed; a history is asked for when it is opened; drawing comes on top"
            f"{', as in a browser' if rows else '; no browser was found'}.",
        ],
    )


def _first_page(client: _Client) -> tuple[float, int]:
    """Seconds until everything is there that the first page draws, and bytes."""
    before, started = client.num_bytes, time.perf_counter()
    client.get("api/runs")
    run = "api/run/long"
    client.together(
        [
            (run, {}),
            (f"{run}/metrics", {"names": ",".join(METRICS), "points": 2000}),
            (f"{run}/events", {}),
            (f"{run}/fleet", {}),
            (f"{run}/similarities", {}),
            (f"{run}/pairs", {"limit": 100}),
        ]
    )
    return time.perf_counter() - started, client.num_bytes - before


def _switches(client: _Client, num: int) -> tuple[list[float], list[float]]:
    """Seconds until a pair and its pictures are there, and until its history is, of pairs all over the run."""
    total = client.get("api/run/long/pairs", limit=0)["total"]
    seconds: list[float] = []
    histories: list[float] = []
    for number in range(num):
        (pair,) = client.get("api/run/long/pairs", offset=number * total // num, limit=1)["pairs"]
        asked = {"step": pair["step"], "pair_id": pair["pair_id"]}
        seconds.append(_seconds(lambda asked=asked: _show_pair(client, asked)))
        histories.append(_seconds(lambda name=pair["pair_id"]: client.get("api/run/long/pair_history", pair_id=name)))
    return seconds, histories


def _show_pair(client: _Client, asked: dict[str, Any]) -> None:
    line = client.get("api/run/long/pair", **asked)
    names = [line["understanding"]["image"], *(sample["image"] for sample in line["generation"]["samples"])]
    client.together([(f"files/long/images/{name}", {}) for name in names])


def _polls(client: _Client, run_dir: Path, bench: DashboardBench) -> tuple[list[float], list[int]]:
    """Seconds and bytes of each poll after a step was added; every poll must bring its step."""
    names, seconds, sizes = ",".join(METRICS), [], []
    run = "api/run/long"
    cursor = client.get(f"{run}/metrics", names=names)["cursor"]
    events = client.get(f"{run}/events")["cursor"]
    for step in range(bench.run.num_steps + 1, bench.run.num_steps + 1 + bench.num_polls):
        with (run_dir / "metrics.jsonl").open("ab") as file:
            file.write(encode_line(metrics_line(step, time.time() + STEP_S * (step - bench.run.num_steps))))
        before, started = client.num_bytes, time.perf_counter()
        _, found, more = client.together(
            [
                (f"{run}/strip", {}),
                (f"{run}/metrics", {"names": names, "since": cursor}),
                (f"{run}/events", {"since": events}),
            ]
        )
        seconds.append(time.perf_counter() - started)
        sizes.append(client.num_bytes - before)
        assert found["steps"] == [step], found["steps"]
        cursor, events = found["cursor"], more["cursor"]
    return seconds, sizes


def _seconds(ask: Callable[[], object]) -> float:
    started = time.perf_counter()
    ask()
    return time.perf_counter() - started


@contextmanager
def _server(folder: Path) -> Iterator[tuple[psutil.Process, str, float]]:
    """The dashboard in a process of its own, its host and port, and the seconds until it could be asked."""
    started = time.perf_counter()
    program = [sys.executable, "-c", "from unirl.cli import main; main()", "dashboard", str(folder)]
    server = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next((line for line in server.stdout if line.startswith("dashboard")), "")
        found = re.search(r"http://\S+", address)
        if found is None:
            raise RuntimeError("bench dashboard: expected the server to print its address; got none; see above")
        host = urlsplit(found[0]).netloc
        _wait_for(host, started)
        yield psutil.Process(server.pid), host, time.perf_counter() - started
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(host: str, started: float) -> None:
    while True:
        try:
            _Client(host).get("api/runs")
        except OSError:
            if time.perf_counter() - started > START_TIMEOUT_S:
                raise
            time.sleep(0.05)
        else:
            return
