import logging

import pytest

from unirl.monitoring.log_files import log_to_files


@pytest.mark.parametrize("verbose", [False, True])
def test_the_file_gets_all_and_the_terminal_what_matters(tmp_path, capsys, monkeypatch, verbose):
    log, engine = logging.getLogger("unirl.somewhere"), logging.getLogger("vllm")
    monkeypatch.setattr(engine, "propagate", True)  # an engine in this process keeps its lines to itself,
    monkeypatch.setattr(engine, "level", logging.NOTSET)  # and asks for fewer
    with log_to_files(tmp_path, verbose=verbose):
        log.info("step %d", 12)
        log.warning("look here")
        engine.info("engine chatter")
    log.warning("after the end")
    written = (tmp_path / "logs" / "driver.log").read_text()
    assert "INFO unirl.somewhere: step 12" in written
    assert "look here" in written
    assert "after the end" not in written
    assert ("engine chatter" in written) == verbose
    shown = capsys.readouterr().err
    assert "look here" in shown
    assert ("step 12" in shown) == verbose


def test_loggers_are_left_as_they_were(tmp_path):
    root, before = logging.getLogger(), (logging.getLogger().level, list(logging.getLogger().handlers))
    with log_to_files(tmp_path):
        assert root.level == logging.INFO
    assert (root.level, root.handlers) == before
