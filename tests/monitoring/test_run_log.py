import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.monitoring.made_run import make_config, make_step
from unirl.config_loading import load_config
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.journal import read_step
from unirl.monitoring.run_log import RunLog
from unirl.monitoring.sentinels import StoppedByAlertError
from unirl.run_files import read_lines

REPOSITORY = Path(__file__).parents[2]


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_run_leaves_every_file_of_the_run_directory(open_log, tmp_path):
    with open_log(overrides=["train.num_steps=2"], pairs_every=2, pairs_per_step=1) as log:
        for step in (1, 2, 3):
            log.record_step(make_step(step))
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {"run.json", "config.yaml", "overrides.txt", "metrics.jsonl", "pairs.jsonl", "used_pairs.jsonl",
                     "events.jsonl", "images", "journal", "evaluations", "lock"}  # fmt: skip
    record = read_run(folder)
    assert [line["step"] for line in record.metrics] == [1, 2, 3]
    assert [line["step"] for line in record.pairs] == [1, 2], "the first step and every second one"
    assert [len(line["pairs"]) for line in record.used_pairs] == [4, 4, 4]
    assert (folder / "overrides.txt").read_text() == "train.num_steps=2\n"
    assert record.run["status"] == "finished"
    assert record.run["changed"]["rollout.pairs_per_step"] == [16, 4]
    assert record.run["git_commit"] is None or len(record.run["git_commit"].rstrip("+")) == 40


def test_shown_pairs_name_images_that_exist_and_the_journal_names_them_too(open_log, tmp_path):
    with open_log(pairs_per_step=2) as log:
        data = make_step(1)
        log.record_step(data)
    (first, second), _ = read_lines(tmp_path / "run" / "pairs.jsonl")
    shown = [sample["image"] for line in (first, second) for sample in line["generation"]["samples"]]
    names = [*shown, *(line[task]["image"] for line in (first, second) for task in ("understanding", "generation"))]
    assert sorted(names) == sorted(file.name for file in (tmp_path / "run" / "images").iterdir())
    assert first["understanding"]["gold"] == data.groups[0].pair.understanding.answer
    assert first["generation"]["samples"][0]["parts"].keys() == {
        "lab_verifier", "lab_verifier/exact", "lab_verifier/partial"
    }  # fmt: skip
    assert {row.image for row in read_step(tmp_path / "run", 1)} == {None, *shown}


def test_the_saved_config_loads_to_an_equal_one(open_log, tmp_path):
    from tests.monitoring.made_run import make_config

    open_log().end("finished")
    assert load_config([tmp_path / "run" / "config.yaml"], []) == make_config()


def test_the_journal_can_be_turned_off(open_log, tmp_path):
    with open_log(journal=False) as log:
        log.record_step(make_step(1))
    assert not (tmp_path / "run" / "journal").exists()


def test_a_second_writer_in_this_process_is_refused(open_log):
    with open_log(), pytest.raises(ValueError, match=r"expected no other writer; got one at work \(this process\)"):
        open_log(resume=True)


WRITER = """
import sys, time
from pathlib import Path
from tests.monitoring.made_run import make_config, make_step
from unirl.monitoring.run_log import RunLog
config = make_config()
log = RunLog(Path(sys.argv[1]), config, config.monitoring, resume=True)
print("up", flush=True)
for step in range(1, 10_000):
    log.record_step(make_step(1) if step == 1 else data)
    if step == 1:
        data = make_step(2)
        print("wrote", flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that writes tmp_path/run without end."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for _ in range(2):
            process.stdout.readline()
        yield process
        process.kill()


def test_a_killed_run_holds_its_folder_until_it_is_gone_stays_readable_and_goes_on(open_log, tmp_path, writer):
    with pytest.raises(ValueError, match=rf"got one at work \(process {writer.pid} on .*\); wait for it"):
        open_log(resume=True)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    folder = tmp_path / "run"
    before = read_run(folder)
    assert before.num_bad_lines == 0
    assert before.run["status"] == "running"
    assert before.metrics[0]["step"] == 1
    assert len(read_step(folder, 1)) == 64
    with open_log(resume=True) as log:
        log.accept()
        log.record_step(make_step(3))
    after = read_run(folder)
    assert after.run["attempt"] == 1
    assert after.run["created"] == before.run["created"]
    assert after.metrics[-1]["attempt"] == 1
    assert [event["kind"] for event in after.events if event["kind"] != "alert"] == ["start", "resume", "end"]


def test_a_folder_with_a_run_is_not_overwritten(open_log, tmp_path):
    open_log().end("finished")
    with pytest.raises(ValueError, match="go on with --resume"):
        open_log()
    assert run_json(tmp_path / "run")["status"] == "finished"


def test_a_folder_with_other_files_is_refused(open_log, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"got thesis.tex; set another train.run_dir"):
        open_log()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_damaged_run_json_is_a_clear_error(open_log, tmp_path):
    open_log().end("finished")
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a run\.json with id, created and attempt"):
        open_log(resume=True)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        open_log(resume=True)


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no GPU"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_how_a_run_ends_is_recorded(open_log, tmp_path, error, status):
    with pytest.raises(type(error)), open_log():
        raise error
    run = run_json(tmp_path / "run")
    assert run["status"] == status
    assert str(error) in run["reason"]
    with open_log(resume=True) as log:
        log.accept()
        log.end("interrupted", "SIGTERM")
    assert run_json(tmp_path / "run")["status"] == "interrupted"


def test_a_resume_that_comes_to_nothing_leaves_settings_and_status(open_log, tmp_path):
    open_log().end("finished")
    files = [tmp_path / "run" / name for name in ("run.json", "config.yaml", "overrides.txt")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(RuntimeError), open_log(resume=True):
        raise RuntimeError("another seed")
    assert [file.read_bytes() for file in files] == before
    assert [event["kind"] for event in read_run(tmp_path / "run").events][-2:] == ["resume", "end"]


def test_the_environment_and_secrets_are_never_recorded(open_log, tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_PASSPHRASE", "open-sesame")
    with open_log(overrides=["teacher.api_key=open-sesame", "hub.token=open-sesame", "rollout.max_tokens=7"]):
        pass
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"open-sesame" not in written
    assert b"rollout.max_tokens=7" in written


def test_what_stops_learning_is_an_event_and_a_warning(open_log, tmp_path, caplog):
    with open_log() as log:
        log.record_step(make_step(1, learner={"policy/kl": float("nan")}))
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[0][0]
    assert line["policy/kl"] is None
    assert line["nonfinite"] == ["policy/kl"]
    alerts = [e["message"] for e in read_run(tmp_path / "run").events if e["kind"] == "alert"]
    assert "policy/kl is nan" in alerts
    assert "step 1, nonfinite: policy/kl is nan -> Look at the rows" in caplog.text


@pytest.mark.parametrize("fields", [{}, {"job": "sft", "local": True}])
def test_alerts_are_counted_at_the_end_and_the_way_on_is_as_the_run_was_started(tmp_path, caplog, fields):
    config, folder = make_config(on_alert="stop"), tmp_path / "a run"
    log = RunLog(folder, config, config.monitoring, facts=fields)
    for step in (1, 2):
        log.record_step(make_step(step, learner={"policy/kl": 0.9, "learner/num_restarts": step - 1}))
    with pytest.raises(StoppedByAlertError) as stopped, log:
        log.check_alerts()
    again = f"unirl sft --resume '{folder}' --local" if fields else f"unirl train --resume '{folder}'"
    assert f"go on with `{again} key=value`; as it is, it would end again" in str(stopped.value)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    counted = Counter(event["sentinel"] for event in read_run(folder).events if event["kind"] == "alert")
    assert counted["far_kl"] == counted["lost_workers"] == 1
    assert (
        sum(
            line.startswith("step 1, far_kl: during the updates the policy is 0.9 nats") and " -> " in line
            for line in lines
        )
        == 1
    )
    assert lines[-1].startswith(f"alerts: {counted.total()} (")
    assert "far_kl 1" in lines[-1]
    assert lines[-1].endswith(f"see {folder / 'events.jsonl'}")


def test_a_run_without_alerts_ends_without_a_word_of_them(open_log, caplog):
    open_log().end("interrupted", "SIGINT")
    assert "alerts:" not in caplog.text


def test_whence_a_run_was_forked_stays_known(open_log, tmp_path):
    open_log().end("interrupted")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"forked_from": {"id": "first", "step": 3}}))
    with open_log(resume=True) as log:
        log.accept()
    assert run_json(tmp_path / "run")["forked_from"] == {"id": "first", "step": 3}


def test_equal_evaluation_images_are_one_file(open_log, tmp_path):
    image = np.full((20, 20, 3), 7, np.uint8)
    with open_log() as log:
        first, again = log.save_evaluation_image(image), log.save_evaluation_image(image.copy())
        other = log.save_evaluation_image(image + 1)
    assert first == again != other
    assert (tmp_path / "run" / first).is_file()


def test_a_full_disk_ends_the_run_with_one_clear_error(tmp_path):
    # 24 KiB holds the start of a run but not many steps.
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24576, 24576))\n" + WRITER
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "expected room for" in last
    assert str(tmp_path / "run") in last
    assert read_run(tmp_path / "run").num_bad_lines == 0
