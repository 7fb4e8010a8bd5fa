"""Ray heads of a test's own: child processes on free ports of loopback, with or without a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port",
    "runtime-env-agent-port", "node-manager-port", "object-manager-port", "dashboard-agent-grpc-port",
    "DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A head that answers."""

    process: subprocess.Popen
    address: str
    """Of the dashboard."""
    gcs: str
    token: str | None

    def get(self, path):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers), timeout=10) as answer:
            return json.load(answer)


def environment(home, **more):
    """Of a head and its clients: no cluster or token of the one who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    own = {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return {**kept, **own, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore", **more}


def free_ports():
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return dict(zip(PORTS, (each.getsockname()[1] for each in sockets), strict=True))


@contextmanager
def ray_head(home, *, num_cpus, token=None):
    """Start a head, wait until it takes jobs, and end it by its pid."""
    ports = free_ports()
    flags = [f"--{name}={port}" for name, port in ports.items() if name.islower()]
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a socket's path holds some hundred letters
    command = [
        BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
        f"--num-cpus={num_cpus}", "--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats",
        *flags,
    ]  # fmt: skip
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    auth |= {name: str(port) for name, port in ports.items() if name.isupper()}
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(home, **auth), stdout=log, stderr=log)
    try:
        head = Head(process, f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}", token)
        wait_for(lambda: _is_ready(head), 90, lambda: (folder / "head.log").read_text())
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _is_ready(head):
    try:
        status = head.get("/api/cluster_status")["data"]["clusterStatus"] or {}
        return bool((status.get("autoscalerReport") or {}).get("nodeTypeMapping"))
    except (OSError, urllib.error.URLError):
        return False


def wait_for(condition, seconds, explain=lambda: ""):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)
