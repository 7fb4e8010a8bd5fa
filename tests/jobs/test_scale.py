import json
import os
import signal
import threading
import time

import pytest

from tests.jobs.runs import SMALL, finish, start, wait_for_step
from unirl import cli
from unirl.monitoring.control import ScaleControl, order_scale
from unirl.monitoring.folder_lock import FolderLock, is_locked


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


@pytest.fixture
def lock(run_dir):
    """The run is under way."""
    lock = FolderLock(run_dir)
    yield lock
    if is_locked(run_dir):
        lock.release()


@pytest.fixture
def scale(run_dir, capsys):
    """`unirl scale RUN ...` in this process: exit code and what it printed."""

    def scale(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["scale", str(run_dir), *arguments])
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return scale


@pytest.fixture
def answering(run_dir, lock):
    """The driver's side, in a thread, gives these answers to the next order."""
    threads = []

    def answering(*answers):
        control = ScaleControl(run_dir, lambda *event: None)

        def drive():
            while (order := control.poll()) is None:
                time.sleep(0.05)
            for state, message in answers:
                control.answer(order, state, message, {})
                time.sleep(0.5)

        threads.append(threading.Thread(target=drive))
        threads[-1].start()

    yield answering
    for thread in threads:
        thread.join()


def test_what_is_no_number_of_workers_is_refused_all_at_once(scale, lock, run_dir):
    code, printed = scale("rollout.video=2", "rollout.text=many", "learner.num_ranks=2")
    assert code == 2
    for word in ("rollout.video", "rollout.text", "many", "learner.num_ranks", "rollout.image"):
        assert word in printed
    assert not (run_dir / "control").exists()


def test_a_run_that_is_not_under_way_is_refused_at_once(scale, run_dir):
    code, printed = scale("rollout.text=2")
    assert (code, "which no process holds" in printed, "--resume" in printed) == (4, True, True)
    (run_dir / "run.json").unlink()
    assert scale("rollout.text=2")[0] == 4
    assert not (run_dir / "control").exists()


def test_it_waits_until_the_workers_are_there(scale, answering):
    answering(("joining", "rollout.text 1 -> 2"), ("joined", "rollout.text 2"))
    assert scale("rollout.text=2") == (0, "joined: rollout.text 2\njoining: rollout.text 1 -> 2\n")


def test_a_refusal_is_exit_1_with_its_reason(scale, answering):
    answering(("refused", "scale: expected workers with places of their own; got ..."))
    code, printed = scale("rollout.text=2", "--json")
    assert code == 1
    assert json.loads(printed)["state"] == "refused"


def test_nobody_waits_for_ever(scale, run_dir, lock):
    code, printed = scale("rollout.text=2", "--timeout", "0.3")
    assert code == 1
    assert "pending: the run has not looked yet" in printed
    other = threading.Timer(0.5, order_scale, (run_dir, {"text": 3}))
    other.start()
    assert scale("rollout.text=2") == (1, "replaced: another order came before this one was carried out\n")
    ending = threading.Timer(0.5, lock.release)
    ending.start()
    assert scale("rollout.text=2") == (1, "ended: the run ended before this was carried out\n")


@pytest.mark.slow
def test_one_to_four_to_two_workers_in_mid_run_leave_the_journal_of_a_fixed_run(tmp_path, capsys):
    """Through Ray and the engines; the run goes on until all is done, and the fixed one makes as many steps."""
    settings = (*SMALL, "train.num_steps=5000", "monitoring.pairs_every=0", "cluster.num_cpus=12", "train.save_every=0",
                "rollout.text.num_workers=0", "rollout.image.num_workers=0", "rollout.both.num_workers=1",
                "rollout.kv_cache_memory_gib=0.0625")  # fmt: skip
    fixed, elastic = tmp_path / "fixed", tmp_path / "elastic"
    process = start(tmp_path, "elastic", f"train.run_dir={elastic}", *settings)
    wait_for_step(elastic, 2, process)
    for count in (4, 2):
        with pytest.raises(SystemExit) as ended:
            cli.main(["scale", str(elastic), f"rollout.both={count}", "--json"])
        answer = json.loads(capsys.readouterr().out)
        assert (ended.value.code or 0, answer["workers"]) == (0, {"both": count}), answer
    wait_for_step(elastic, num_steps(elastic) + 2, process)
    os.killpg(process.pid, signal.SIGINT)
    finish(process, tmp_path, "elastic", 130)
    events = [json.loads(line) for line in (elastic / "events.jsonl").read_text().splitlines()]
    assert [event["message"] for event in events if event["kind"] == "scale"] == [
        "rollout.both 1 -> 4", "rollout.both 4", "rollout.both 4 -> 2", "rollout.both 2",
    ]  # fmt: skip
    arguments = (f"train.run_dir={fixed}", *settings, f"train.num_steps={num_steps(elastic)}")
    finish(start(tmp_path, "fixed", *arguments), tmp_path, "fixed")
    journals = sorted((fixed / "journal").iterdir())
    assert len(journals) == num_steps(elastic)
    for journal in journals:
        assert (elastic / "journal" / journal.name).read_bytes() == journal.read_bytes(), journal.name


def num_steps(run_dir):
    """Steps that the run has made so far."""
    return len((run_dir / "metrics.jsonl").read_text().splitlines())
