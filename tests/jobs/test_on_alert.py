"""`monitoring.on_alert=stop`: a checkpoint, a clear error, and a run that can go on."""

import json
import re
from dataclasses import replace

import pytest

from unirl.config_loading import load_config
from unirl.jobs import rl
from unirl.jobs.faults import reward_faults
from unirl.jobs.faults.lab_run import SMALL
from unirl.jobs.run_dirs import last_step
from unirl.learner.commits import committed, step_of
from unirl.monitoring.sentinels import StoppedByAlertError


@pytest.fixture
def config(tmp_path):
    own = (f"train.run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "train.num_steps=4",
           "train.keep_checkpoints=1")  # fmt: skip
    return load_config([], [*SMALL, *own, "monitoring.on_alert=stop"])


def test_an_alert_saves_and_ends_the_run_which_then_goes_on(config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert rl.main(replace(config, train=replace(config.train, num_steps=1)), local=True) == 0
    assert "alerts:" not in capsys.readouterr().err
    for step in (2, 3):  # gone on with as it is, it ends again
        with reward_faults.sign_lost(), pytest.raises(StoppedByAlertError) as caught:
            rl.main(config, local=True, resume=str(run_dir))
        assert last_step(run_dir) == step
    said = str(caught.value)
    assert "disordered_advantages: in " in said
    assert f"go on with `unirl train --resume {run_dir} --local key=value`" in said
    run = json.loads((run_dir / "run.json").read_text())
    assert run["status"] == "failed"
    assert run["reason"].startswith("StoppedByAlertError: monitoring.on_alert=stop: disordered_advantages")
    kept = [step_of(folder) for folder in committed(run_dir / "checkpoints")]
    assert kept == [1, 3], "one checkpoint, and one from before"
    assert "WARNING unirl.monitoring.run_log: step 3, disordered_advantages: in " in capsys.readouterr().err
    assert rl.main(config, local=True, resume=str(run_dir)) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["attempt"]) for line in lines] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    alerts = [(e["step"], e["since"], e["severity"]) for e in events if e["kind"] == "alert"]
    assert alerts == [(2, 2, "stop"), (3, 2, "stop")]
    told = f"alerts: 2 (disordered_advantages 2), see {run_dir / 'events.jsonl'}"
    assert told in capsys.readouterr().err
    driver = (run_dir / "logs" / "driver.log").read_text()
    assert told in driver
    assert len(re.findall(r"WARNING .*: step \d, disordered_advantages: in .* -> A defect of the code", driver)) == 2


def test_an_alert_of_what_does_no_harm_ends_nothing(config, tmp_path):
    patient = replace(config, rewards=replace(config.rewards, max_unjudged_fraction=1.0))
    with reward_faults.one_group_fails():
        assert rl.main(patient, local=True) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {e["severity"] for e in events if e["kind"] == "alert"} == {"warn"}
