import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

from unirl.monitoring.durable_files import JsonLines, encode_line, write_atomic
from unirl.run_files import read_lines


def test_numbers_that_json_lacks_become_null_and_are_named():
    line = json.loads(encode_line({"a": math.nan, "b": 1.5, "c": {"d": [1.0, math.inf]}, "e": np.float32(0.5)}))
    assert line == {"a": None, "b": 1.5, "c": {"d": [1.0, None]}, "e": 0.5, "nonfinite": ["a", "c/d/1"]}


def test_a_closed_file_says_so_and_touches_no_other(tmp_path):
    file = JsonLines(tmp_path / "one.jsonl")
    file.append({"step": 1})
    file.close()
    other = (tmp_path / "other").open("wb")  # takes the number that was free
    file.close()
    for use in (lambda: file.append({"step": 2}), file.sync):
        with pytest.raises(ValueError, match=r"one\.jsonl: expected an open file; got one that was closed"):
            use()
    other.write(b"whole")
    other.close()
    assert (tmp_path / "other").read_bytes() == b"whole"


def test_line_breaks_in_a_text_stay_inside_one_line():
    assert encode_line({"text": "a\nb\r\u2028"}).count(b"\n") == 1


def test_a_torn_end_costs_one_line_and_none_of_the_following(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2,"lo')
    assert read_lines(path) == ([{"step": 1}], 0), "a line without its newline is still being written"
    file = JsonLines(path)
    file.append({"step": 3})
    file.append({"step": 4})
    file.close()
    assert read_lines(path) == ([{"step": 1}, {"step": 3}, {"step": 4}], 1)


def test_writers_killed_at_any_moment_leave_only_whole_lines(tmp_path):
    code = (
        "import sys; from pathlib import Path; from unirl.monitoring.durable_files import JsonLines\n"
        "file = JsonLines(Path(sys.argv[1])); print('up', flush=True)\n"
        "n = 0\n"
        "while True:\n    file.append({'n': n, 'pad': 'x' * (n % 5000)}); n += 1"
    )
    lines = 0
    for number in range(6):
        path = tmp_path / f"{number}.jsonl"
        with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(0.02 + 0.013 * number)
            writer.kill()
        records, bad = read_lines(path)
        assert bad == 0
        assert [record["n"] for record in records] == list(range(len(records)))
        lines += len(records)
    assert lines > 100


def in_child_with_file_limit(limit_bytes, code):
    """Runs code in a child whose files may not grow beyond a size: a full disk that needs no disk."""
    head = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60, check=False)


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    result = in_child_with_file_limit(
        1000,
        "from pathlib import Path; from unirl.monitoring.durable_files import write_atomic\n"
        f"write_atomic(Path({str(path)!r}), b'x' * 5000)",
    )
    last = result.stderr.strip().splitlines()[-1]
    assert all(words in last for words in ("expected room for 5000 more bytes", "bytes free", "--resume", str(path)))
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "old"


def test_a_line_that_fits_in_part_is_an_error_and_is_closed_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    result = in_child_with_file_limit(
        60,
        "from pathlib import Path; from unirl.monitoring.durable_files import JsonLines\n"
        f"file = JsonLines(Path({str(path)!r})); file.append({{'n': 1}}); file.append({{'n': 'x' * 100}})",
    )
    assert "expected room for" in result.stderr.splitlines()[-1]
    file = JsonLines(path)
    file.append({"n": 3})
    file.close()
    assert read_lines(path) == ([{"n": 1}, {"n": 3}], 1)


@pytest.mark.parametrize("sync", [True, False])
def test_an_atomic_write_replaces_the_whole_file(tmp_path, sync):
    for data in (b"a long first version", b"short"):
        write_atomic(tmp_path / "file", data, sync=sync)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"short"]
