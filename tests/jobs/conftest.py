import pytest

from tests.monitoring.made_run import make_run
from unirl import cli


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    """A finished run with two evaluations; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("made") / "run", num_steps=12, num=40, pairs_every=6)


@pytest.fixture
def unirl(capsys):
    """`unirl ...` in this process: exit code, stdout and stderr."""

    def unirl(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(map(str, words)))
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return unirl
