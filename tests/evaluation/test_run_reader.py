import errno
import json
import os
import shutil

import pytest

from unirl.evaluation.run_reader import read_run
from unirl.run_files import Tail, read_lines


def test_a_run_is_read_whole(run_dir):
    record = read_run(run_dir)
    assert [line["step"] for line in record.metrics] == list(range(1, 13))
    assert list(record.evaluations) == [0, 12]
    assert {line["step"] for line in record.pairs} == {1, 6, 12}
    assert record.num_bad_lines == 0
    assert [step for step, _ in record.series("reward/generation")] == list(range(1, 13))
    assert record.series("no/such") == []


def test_of_a_step_run_again_the_last_line_counts(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"v": 1, "step": 5, "attempt": 1, "reward/generation": 9.0}) + "\n{torn")
    record = read_run(copy)
    assert len(record.metrics) == 12
    assert dict(record.series("reward/generation"))[5] == 9.0


def test_unreadable_lines_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n[1]\n\xff\xfe\n{"step": 2}\n')
    assert read_lines(path) == ([{"step": 1}, {"step": 2}], 3)
    assert read_lines(tmp_path / "none.jsonl") == ([], 0)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_read_is_not_taken_for_one_without_lines(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        read_lines(tmp_path / "metrics.jsonl")
    assert Tail(tmp_path, "metrics.jsonl").news() == [], "who watches a run tries again"


def test_a_folder_without_a_run_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected a readable run\.json"):
        read_run(tmp_path)


def test_a_damaged_evaluation_is_named(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    (copy / "evaluations" / "step_000012.json").write_text('{"items": []}')
    with pytest.raises(ValueError, match=r"step_000012\.json: .*evaluate again"):
        read_run(copy)
