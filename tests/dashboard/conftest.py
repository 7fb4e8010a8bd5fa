import json
import shutil

import pytest
from starlette.testclient import TestClient

from tests.monitoring.made_run import make_run
from unirl.dashboard.app import create_app

NUM_STEPS = 12


def ask(runs_dir, **options):
    """A browser before the dashboard of a folder."""
    return TestClient(create_app(runs_dir, **options), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def add_lines(path, *lines):
    with path.open("ab") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """A folder with one run, written by RunLog: 12 steps, two evaluations, pairs of every second step."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "grid" / "seed~0", num_steps=NUM_STEPS, num=6, pairs_every=2, pairs_per_step=2, journal=False)
    return folder


@pytest.fixture(scope="session")
def finished_run(finished_runs):
    return finished_runs / "grid" / "seed~0"


@pytest.fixture(scope="session")
def client(finished_runs):
    with ask(finished_runs) as client:
        yield client


@pytest.fixture
def own_runs(finished_run, tmp_path):
    """A folder with a copy of the run, `one`, that a test may damage."""
    shutil.copytree(finished_run, tmp_path / "runs" / "one")
    return tmp_path / "runs"
