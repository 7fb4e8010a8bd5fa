import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from unirl.evaluation.comparison import compare_evaluations, shared
from unirl.evaluation.run_reader import read_run
from unirl.monitoring.folder_lock import FolderLock
from unirl.run_files import Tail, find_runs, last_records

ROOT = Path(__file__).parents[2]
BLOCKED = ("torch", "ray", "vllm", "transformers", "deepspeed", "pyarrow", "faiss", "fastapi", "tensorboardX", "wandb")


@pytest.fixture
def runs(run_dir, tmp_path):
    """A folder of runs: finished, killed, failed, one inside a folder, and one whose run.json is cut short."""
    for name in ("a-finished", "b-killed", "c-failed", "deep/d-other", "e-cut"):
        shutil.copytree(run_dir, tmp_path / "runs" / name)
    change(tmp_path / "runs/b-killed", status="running", created="2026-11-20T10:00:00+0000")
    change(tmp_path / "runs/c-failed", status="failed", reason="OSError: disk", created="2026-11-19T10:00:00+0000")
    change(tmp_path / "runs/deep/d-other", created="2026-11-21T10:00:00+0000")
    (tmp_path / "runs/e-cut/run.json").write_text('{"id": "e')
    return tmp_path / "runs"


def change(folder, **facts):
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


def test_runs_are_listed_by_time_with_what_became_of_them(unirl, runs):
    code, out, _ = unirl("runs", "list", runs, "--json")
    listed = json.loads(out)
    assert code == 0
    assert [(Path(run["folder"]).name, run["status"]) for run in listed] == [
        ("e-cut", "unreadable"),
        ("c-failed", "failed"),
        ("b-killed", "killed"),
        ("d-other", "finished"),
        ("a-finished", "finished"),
    ]
    last = [value for _, value in read_run(runs / "a-finished").series("reward/generation")][-5:]
    assert listed[-1]["last"]["reward/generation"] == pytest.approx(sum(last) / 5)
    assert (listed[-1]["step"], listed[-1]["num_steps"]) == (12, 12)
    text = unirl("runs", "list", runs)[1].splitlines()
    assert len(text) == 6
    assert "killed" in text[3]
    assert f"r_gen={sum(last) / 5:.3f}" in text[-1]


def test_a_live_run_is_running_and_one_that_is_begun_again_is_starting(unirl, runs):
    with (runs / "c-failed" / "events.jsonl").open("a") as file:
        file.write('{"kind":"resume"}\n')
    locks = [FolderLock(runs / name) for name in ("b-killed", "c-failed", "a-finished")]
    listed = {Path(run["folder"]).name: run["status"] for run in json.loads(unirl("runs", "list", runs, "--json")[1])}
    for lock in locks:
        lock.release()
    assert (listed["b-killed"], listed["c-failed"]) == ("running", "starting")
    assert listed["a-finished"] == "finished", "it has ended and is about to let go"


def test_what_lies_inside_a_run_is_no_run(runs, tmp_path):
    shutil.copytree(runs / "a-finished", runs / "a-finished" / "copy")
    assert len(list(find_runs(runs))) == 5
    assert list(find_runs(runs / "a-finished")) == [runs / "a-finished"]


def test_an_empty_folder_and_none_at_all(unirl, tmp_path):
    code, out, err = unirl("runs", "list", tmp_path)
    assert (code, out) == (0, "")
    assert "no run below" in err
    code, _, err = unirl("runs", "list", tmp_path / "nothing")
    assert code == 4
    assert "expected a folder of runs; got" in err


def test_show_says_what_a_run_was_did_and_scored(unirl, runs):
    code, out, _ = unirl("runs", "show", runs / "c-failed")
    assert code == 0
    for words in ("failed: OSError: disk", "12 of 12, attempt 0", "reward/generation/aligned", "train.num_steps=12"):
        assert words in out
    document = json.loads(unirl("runs", "show", runs / "c-failed", "--json")[1])
    record = read_run(runs / "c-failed")
    measure = "understanding/sampled/accuracy/correct"
    assert document["evaluations"]["12"][measure]["low"] == record.evaluations[12].estimates[measure].low
    row = next(line for line in out.splitlines() if line.startswith(measure))
    low, high = (getattr(record.evaluations[12].estimates[measure], end) for end in ("low", "high"))
    assert f"[{low:.3f}, {high:.3f}] (n 40)" in row
    assert f"unirl train --resume {runs / 'b-killed'}" in unirl("runs", "show", runs / "b-killed")[1]
    assert "--resume" not in out


@pytest.mark.parametrize("damage", ["run.json", "evaluations/step_000012.json"])
def test_a_damaged_run_ends_with_4_and_names_the_file(unirl, runs, damage):
    (runs / "a-finished" / damage).write_text("{")
    code, _, err = unirl("runs", "show", runs / "a-finished")
    assert code == 4
    assert "expected" in err
    assert Path(damage).name in err


def test_no_run_ends_with_4(unirl, tmp_path):
    code, _, err = unirl("runs", "show", tmp_path)
    assert code == 4
    assert "expected a run directory with a run.json" in err


def with_settings(folder, **changes):
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        group, name = key.split("__")
        tree[group][name] = value
    file.write_text(yaml.safe_dump(tree))


def with_other_answers(folder):
    """The last evaluation with every third understanding item wrong; its means are made anew."""
    file = folder / "evaluations" / "step_000012.json"
    document = json.loads(file.read_text())
    for number, item in enumerate(document["items"]):
        if item["task"] == "understanding" and item["mode"] == "sampled" and number % 3 == 0:
            item["reward"] = 0.0
            item["parts"] = {**item["parts"], "accuracy": 0.0, "accuracy/correct": 0.0}
    file.write_text(json.dumps(document))


def test_compare_shows_settings_that_differ_and_paired_differences(unirl, runs):
    one, other = runs / "a-finished", runs / "b-killed"
    with_settings(other, learner__lr=0.125, train__seed=7)
    with_other_answers(other)
    code, out, _ = unirl("runs", "compare", one, other, "--json")
    assert code == 0
    document = json.loads(out)
    assert {key: values[1] for key, values in document["settings"].items()} == {
        "learner.lr": "0.125",
        "train.seed": "7",
    }
    before, after = (
        {i["id"]: i["parts"]["accuracy/correct"] for i in json.loads(file.read_text())["items"]
         if i["task"] == "understanding" and i["mode"] == "sampled"}
        for file in (folder / "evaluations/step_000012.json" for folder in (one, other))
    )  # fmt: skip
    gains = [after[name] - before[name] for name in before]
    rows = {row["name"]: row for row in document["evaluation"]}
    found = rows["understanding/sampled/accuracy/correct"]["differences"][0]
    assert found["mean"] == pytest.approx(sum(gains) / len(gains))
    assert found["low"] < found["mean"] < found["high"] < 0
    text = unirl("runs", "compare", one, other)[1]
    assert "learner.lr" in text
    assert f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] (n 40)" in text


def test_other_held_out_items_are_not_taken_for_the_same(unirl, runs):
    other = runs / "b-killed"
    file = other / "evaluations" / "step_000012.json"
    document = json.loads(file.read_text())
    for item in document["items"]:
        item["prompt"] += " really"
    file.write_text(json.dumps(document))
    out = unirl("runs", "compare", runs / "a-finished", other)[1]
    assert "different held-out items" in out
    results = [read_run(runs / name).evaluations[12] for name in ("a-finished", "b-killed")]
    assert [len(side.items) for side in shared(*results)] == [0, 0]
    assert all(row.differences == (None,) for row in compare_evaluations(results))


def test_a_run_without_an_evaluation_is_compared_by_its_settings(unirl, runs):
    shutil.rmtree(runs / "b-killed" / "evaluations")
    document = json.loads(unirl("runs", "compare", runs / "b-killed", runs / "a-finished", "--json")[1])
    assert document["settings"] == {}
    assert all(row["estimates"][0] is None and row["differences"] == [None] for row in document["evaluation"])
    assert document["evaluated_at"] == {"b-killed": None, "a-finished": 12}
    out = unirl("runs", "compare", runs / "b-killed", runs / "a-finished")[1]
    assert "b-killed has no evaluation" in out
    assert "different held-out items" not in out
    assert "a-finished, step 12" in out


def test_what_a_run_took_leaves_out_the_pause_before_it_was_resumed(unirl, runs):
    folder, lines = runs / "b-killed", (runs / "b-killed" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines[:4]]
    start = steps[0]["time"]
    for number, line in enumerate(steps):
        line |= {
            "time/step_s": 10.0,
            "time": start + 10 * number + (36_000 if number > 1 else 0),
            "attempt": number // 2,
        }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    events = [
        {"kind": "start", "attempt": 0, "time": start - 10},
        {"kind": "resume", "attempt": 1, "time": start + 36_010},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    change(folder, attempt=1)
    took = {Path(run["folder"]).name: run["duration_s"] for run in json.loads(unirl("runs", "list", runs, "--json")[1])}
    assert took["b-killed"] == pytest.approx(10 + 10 + 10 + 10)


def test_compare_wants_two(unirl, runs):
    code, _, err = unirl("runs", "compare", runs / "a-finished")
    assert code == 2
    assert "two or more" in err


def test_a_follower_reads_whole_lines_once_and_a_new_file_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Tail(tmp_path, path.name)
    assert follower.news() == []
    path.write_text('{"step": 1}\n{"st')
    assert follower.news() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\nnonsense\n{"step": 3}\n')
    assert follower.news() == [{"step": 2}, {"step": 3}]
    assert follower.news() == []
    path.write_text('{"step": 9}\n')
    assert follower.news() == [{"step": 9}]


def test_the_end_of_a_long_file_is_read_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in range(10000)))
    found = [line["step"] for line in last_records(tmp_path, path.name, num_bytes=100)][::-1]
    assert found == list(range(10000 - len(found), 10000))
    assert 3 < len(found) < 9
    assert len(list(last_records(tmp_path, path.name, num_bytes=10**7))) == 10000


LIVE = """
import sys
from pathlib import Path
from unirl.config import RlConfig
from unirl.monitoring.run_log import RunLog
config = RlConfig()
sys.stdin.readline()
with RunLog(Path(sys.argv[1]), config, config.monitoring, facts={"num_steps": 3}) as log:
    print("up", flush=True)
    for step in (1, 2, 3):
        sys.stdin.readline()
        log.write_metrics(step, {"reward/generation": 0.1 * step, "time/step_s": 2.0})
    sys.stdin.readline()
"""
TAIL = "from unirl.cli import main; main()"


@pytest.fixture
def live(tmp_path):
    """A run that makes a step when it is told to, and `unirl runs tail` of it, begun before there is a run."""
    writer = subprocess.Popen(
        [sys.executable, "-c", LIVE, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", TAIL, "runs", "tail", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "waiting up to 60 s" in reader.stderr.readline()
    next_step(writer)
    assert writer.stdout.readline() == "up\n"
    yield writer, reader
    for process in (writer, reader):
        if process.poll() is None:
            process.kill()
        process.communicate()


def next_step(writer):
    writer.stdin.write("\n")
    writer.stdin.flush()


def test_tail_waits_for_a_run_follows_it_and_ends_with_it(live):
    writer, reader = live
    for step in (1, 2, 3):
        next_step(writer)
        line = reader.stdout.readline()  # before the next step is made
        assert line.startswith(f"step={step}/3 r_gen={0.1 * step:.3f} ")
    assert " eta=0s" in line
    assert reader.poll() is None
    next_step(writer)
    out, err = reader.communicate(timeout=20)
    assert (out, reader.returncode) == ("", 0)
    assert err.splitlines()[-1].endswith("run: finished")


def test_ctrl_c_ends_tail_alone_and_a_killed_run_is_told(live, tmp_path):
    writer, reader = live
    next_step(writer)
    reader.stdout.readline()
    reader.send_signal(signal.SIGINT)
    _, err = reader.communicate(timeout=20)
    assert reader.returncode == 130
    assert "Traceback" not in err
    assert writer.poll() is None
    with subprocess.Popen(
        [sys.executable, "-c", TAIL, "runs", "tail", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as other:  # fmt: skip
        assert other.stdout.readline().startswith("step=1/3")
        writer.kill()
        _, err = other.communicate(timeout=20)
    assert other.returncode == 1
    assert err.splitlines()[-1].endswith("run: killed")


def test_tail_of_an_ended_run_prints_its_last_steps(unirl, runs):
    code, out, err = unirl("runs", "tail", runs / "a-finished", "-n", 2)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["step=11/12", "step=12/12"]
    assert "finished" in err
    code, out, _ = unirl("runs", "tail", runs / "c-failed", "-n", 1, "--json")
    assert code == 1
    assert json.loads(out)["step"] == 12


def test_tail_of_nothing_gives_up(unirl, tmp_path):
    start = time.monotonic()
    code, _, err = unirl("runs", "tail", tmp_path / "none", "--wait", 0.1)
    assert code == 4
    assert "waiting up to 0.1 s" in err
    assert time.monotonic() - start < 5


def without(*packages):
    """The start of a program in which packages are absent."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split('.')[0] in {packages!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_everything_works_where_only_the_light_packages_are(runs, tmp_path):
    program = (
        without(*BLOCKED) + "from unirl.cli import main\n"
        "for words in (['list', sys.argv[1]], ['show', sys.argv[1] + '/a-finished'],\n"
        "              ['compare', sys.argv[1] + '/a-finished', sys.argv[1] + '/b-killed'],\n"
        "              ['tail', sys.argv[1] + '/a-finished']):\n"
        "    try: main(['runs', *words])\n"
        "    except SystemExit as end: assert not end.code, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, runs], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_alerts_are_shown_with_step_sentinel_and_remedy(unirl, run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    alert = {"kind": "alert", "step": 12, "sentinel": "far_kl", "message": "0.9 nats away", "remedy": "Lower the rate."}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(alert) + "\n" + json.dumps({"kind": "alert", "message": "of an older run"}) + "\n")
    lines = [line.strip() for line in unirl("runs", "show", folder)[1].splitlines()]
    assert lines[-2:] == ["step 12, far_kl: 0.9 nats away -> Lower the rate.", "of an older run"]
