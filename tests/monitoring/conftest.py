import pytest

from tests.monitoring.made_run import make_config
from unirl.monitoring.run_log import RunLog


@pytest.fixture
def open_log(tmp_path):
    """Opens the run directory tmp_path/run; further arguments go to the monitoring section."""

    def open_log(*, resume=False, overrides=(), **monitoring):
        config = make_config(**monitoring)
        return RunLog(tmp_path / "run", config, config.monitoring, resume=resume, overrides=overrides)

    return open_log
