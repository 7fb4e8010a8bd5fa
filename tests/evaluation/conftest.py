import pytest

from tests.monitoring.made_run import make_run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run with two evaluations; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("made") / "run", num_steps=12, num=40, pairs_every=6)
