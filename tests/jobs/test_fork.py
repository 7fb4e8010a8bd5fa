"""`unirl runs fork`: what a new run directory takes over, what it leaves, and what goes on from it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.runs import SMALL
from unirl.config_loading import load_config
from unirl.data.atomic import DataError
from unirl.evaluation.run_reader import read_run
from unirl.jobs import fork, rl
from unirl.learner import commits
from unirl.monitoring.durable_files import read_lines
from unirl.monitoring.folder_lock import FolderLock
from unirl.monitoring.journal import recorded_steps, weights_after


def commit(run_dir, step, pairs=()):
    """A checkpoint with nothing of value in it."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"w" * step)
    state = {"policy_version": step, "run": {"step": step, "pairs": {"done": list(pairs)}}}
    (folder / "COMMIT.json").write_text(json.dumps({"step": step, "state": state, "files": {"weights.pt": step}}))


@pytest.fixture
def run(run_dir, tmp_path):
    """A made run of 12 steps, evaluated before and after, of which 1 and 6 show pairs; checkpoints after 4 and 8."""
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    for step in (4, 8):
        commit(folder, step, pairs=range(step))
    (folder / "pairing.jsonl").write_text('{"step": 11, "results": []}\n')
    (folder / "quarantine.jsonl").write_text('{"step": 3}\n{"step": 9}\n')
    (folder / "ahead" / "step_000013").mkdir(parents=True)
    return folder


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def steps_in(folder, name):
    return [line["step"] for line in read_lines(folder / f"{name}.jsonl")]


def test_a_fork_holds_the_run_as_it_was_after_the_step(run, tmp_path, unirl):
    before, new = everything_in(run), tmp_path / "new"
    code, out, _ = unirl("runs", "fork", run, new, "--step", 4)
    assert (code, everything_in(run)) == (0, before)
    assert out.endswith(f"go on with: unirl train --resume {new} key=value\n")
    assert steps_in(new, "metrics") == steps_in(new, "used_pairs") == [1, 2, 3, 4]
    assert steps_in(new, "quarantine") == [3]
    assert set(steps_in(new, "pairs")) == {1}
    assert list(recorded_steps(new, 0)) == [1, 2, 3, 4]
    assert [path.name for path in commits.committed(new / "checkpoints")] == ["step_00000004"]
    assert (new / "checkpoints" / "latest").read_text() == "step_00000004"
    assert read_lines(new / "pairing.jsonl") == [{"state": {"done": [0, 1, 2, 3]}}]
    for name in ("config.yaml", "overrides.txt"):
        assert (new / name).read_bytes() == (run / name).read_bytes()
    assert not {"ahead", "policy", "report.html", "lock", "actors"} & {path.name for path in new.iterdir()}
    record = read_run(new)
    assert list(record.evaluations) == [0]
    shown = {sample["image"] for line in record.pairs for sample in line["generation"]["samples"]}
    assert shown <= {path.name for path in (new / "images").iterdir()}
    assert all(int(path.name.split("_")[0]) <= 4 for path in (new / "images").iterdir())
    assert all(event.get("step", 0) <= 4 for event in record.events)
    facts = record.run
    assert (facts["id"], facts["status"]) == ("new", "interrupted")
    assert facts["forked_from"] == {"id": "run", "step": 4}
    weights = "checkpoints/step_00000004/weights.pt"
    assert (new / weights).stat().st_ino == (run / weights).stat().st_ino


def test_without_a_step_the_newest_checkpoint_is_taken(run, tmp_path, unirl):
    _, out, _ = unirl("runs", "fork", run, tmp_path / "new", "--json")
    assert json.loads(out)["step"] == 8


def test_names_are_those_of_runs_in_the_usual_folder(run, tmp_path, unirl, monkeypatch):
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    assert unirl("runs", "fork", "first", "second")[0] == 0
    assert (tmp_path / "runs" / "second" / "run.json").is_file()


def test_a_fine_tuning_run_is_forked_alike(run, tmp_path, unirl):
    facts = json.loads((run / "run.json").read_text()) | {"job": "sft", "local": True}
    (run / "run.json").write_text(json.dumps(facts))
    shutil.rmtree(run / "journal")
    image = "evaluations/images/0123abcd.webp"
    (run / image).write_bytes(b"a picture")
    for name in ("heldout_000000", "heldout_000004", "heldout_000008", "exam_000000", "exam_000012"):
        (run / "evaluations" / f"{name}.json").write_text(json.dumps({"items": [{"reply": [{"image": image}]}]}))
    new = tmp_path / "new"
    code, out, err = unirl("runs", "fork", run, new, "--step", 4)
    assert code == 0, err
    assert out.endswith(f"go on with: unirl sft --resume {new} --local key=value\n")
    names = {path.name for path in (new / "evaluations").glob("*.json")}
    assert names == {"step_000000.json", "heldout_000000.json", "heldout_000004.json", "exam_000000.json"}
    assert (new / image).read_bytes() == b"a picture"


def test_events_without_a_step_are_kept_where_they_came_before(run, tmp_path):
    def event(kind, **fields):
        return json.dumps({"v": 1, "kind": kind, "message": kind, "time": 1.0, "attempt": 0, **fields}) + "\n"

    lines = [
        event("start"), event("checkpoint", step=4), event("alert", step=5), event("end"), event("resume"),
        event("checkpoint", step=8), event("restart"), event("checkpoint", step=12), event("end"),
    ]  # fmt: skip
    (run / "events.jsonl").write_text("".join(lines))
    fork.make_fork(run, tmp_path / "four", 4)
    fork.make_fork(run, tmp_path / "eight", 8)
    assert [event["kind"] for event in read_run(tmp_path / "four").events] == ["start", "checkpoint", "fork"]
    kinds = [event["kind"] for event in read_run(tmp_path / "eight").events]
    assert kinds == ["start", "checkpoint", "alert", "end", "resume", "checkpoint", "fork"]


def test_what_cannot_be_forked_is_refused_and_leaves_nothing(run, tmp_path, unirl):
    new = tmp_path / "new"
    code, _, err = unirl("runs", "fork", run, new, "--step", 5)
    assert (code, "with a checkpoint, of 4, 8; got 5" in err) == (4, True)
    code, _, err = unirl("runs", "fork", run, run / "inner")
    assert (code, "expected a folder outside of" in err) == (4, True)
    (tmp_path / "there").mkdir()
    assert unirl("runs", "fork", run, tmp_path / "there")[0] == 4
    for folder in (run / "checkpoints").iterdir():
        (folder / "COMMIT.json").unlink()
    code, _, err = unirl("runs", "fork", run, new)
    assert (code, "expected a run with a committed checkpoint; got none" in err) == (4, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_only_the_words_of_the_command_may_be_missing(run, tmp_path):
    (run / "overrides.txt").unlink()
    fork.make_fork(run, tmp_path / "new", 4)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"expected a config\.yaml in .*; got none; restore the file"):
        fork.make_fork(run, tmp_path / "other", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


@pytest.mark.parametrize("name", ["", ".", "..", "../run.json", "a.webp/..", "run.json"])
def test_what_is_no_name_of_a_picture_is_passed_over(run, tmp_path, name):
    line = {"step": 2, "understanding": {"image": name}, "generation": {"samples": [{"image": name}]}}
    with (run / "pairs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    fork.make_fork(run, tmp_path / "new", 4)
    assert all(path.suffix == ".webp" for path in (tmp_path / "new" / "images").iterdir())


@pytest.mark.parametrize(
    "name", ["checkpoints/step_00000004/weights.pt", "metrics.jsonl", "journal/step_000002.parquet"]
)
def test_links_out_of_the_run_are_refused_and_nothing_is_left(run, tmp_path, name):
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    with pytest.raises(DataError, match="expected a file of the run itself; got"):
        fork.make_fork(run, tmp_path / "new", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]


def test_a_checkpoint_that_vanishes_meanwhile_is_a_clear_error(run, tmp_path, monkeypatch):
    chosen = fork.choose_checkpoint(run, 4)
    (chosen / "weights.pt").unlink()
    monkeypatch.setattr(fork, "choose_checkpoint", lambda source, step: chosen)
    with pytest.raises(DataError, match=r"it may have been deleted meanwhile .*choose a newer one"):
        fork.make_fork(run, tmp_path / "new", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_are_copied_and_synced_where_they_cannot_be_linked(run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    new, synced, fsync = tmp_path / "new", set(), os.fsync

    def sync(handle):
        if not new.exists():
            synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", sync)
    fork.make_fork(run, new, 8)
    assert (new / "checkpoints/step_00000008/weights.pt").read_bytes() == b"w" * 8
    unsynced = [path for path in (new, *new.rglob("*")) if path.stat().st_ino not in synced]
    assert not unsynced, "a fork survives a power cut once it has its name"


def test_a_run_that_is_being_written_can_be_forked_and_says_so(run, tmp_path, unirl):
    lock = FolderLock(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    code, _, err = unirl("runs", "fork", run, tmp_path / "new", "--step", 4)
    lock.release()
    assert (code, "is being written; it goes on" in err) == (0, True)
    assert steps_in(tmp_path / "new", "metrics") == [1, 2, 3, 4]


SLOW_LINK = """
import os, sys, time
from unirl.cli import main
link = os.link
os.link = lambda *names: (print("linking", flush=True), time.sleep(30))
main(["runs", "fork", *sys.argv[1:]])
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_fork_leaves_nothing(run, tmp_path, signum, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_LINK, run, tmp_path / "new"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == b"linking\n"
    time.sleep(0.1)
    process.send_signal(signum)
    assert process.wait(timeout=30) == code
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_fork_with_unchanged_settings_makes_the_very_steps_of_the_original(tmp_path):
    """A real run; its fork after step 1 samples and learns step 2 and 3 again, to the bit."""
    run_dir, new = tmp_path / "run", tmp_path / "new"
    own = (
        f"train.run_dir={run_dir}", f"data.cache_dir={tmp_path / 'cache'}", "train.num_steps=3", "train.save_every=1",
        "train.keep_checkpoints=0", "rollout.backend=torch",
    )  # fmt: skip
    config = load_config([], [*SMALL, *own])
    assert rl.main(config, local=True) == 0
    before = everything_in(run_dir)
    assert fork.main(run_dir, new, step=1) == 0
    assert list(recorded_steps(new, 0)) == [1]
    again = load_config([new / "config.yaml"], [])
    assert rl.main(again, local=True, resume=str(new)) == 0
    assert [weights_after(new, step) for step in (1, 2, 3)] == [weights_after(run_dir, step) for step in (1, 2, 3)]
    for name in ("used_pairs.jsonl", "policy/model.safetensors"):
        assert (new / name).read_bytes() == before[name]
    # Other settings, from the same place, are another run; the original stays as it was.
    assert fork.main(run_dir, tmp_path / "other", step=1) == 0
    other = load_config([tmp_path / "other" / "config.yaml"], ["learner.lr=1e-4"])
    assert rl.main(other, local=True, resume=str(tmp_path / "other")) == 0
    assert weights_after(tmp_path / "other", 3) != weights_after(run_dir, 3)
    assert everything_in(run_dir) == before
    run = json.loads((new / "run.json").read_text())
    assert run["forked_from"] == {"id": "run", "step": 1}
    assert (run["id"], run["status"], run["job"], run["local"]) == ("new", "finished", "train", True)
