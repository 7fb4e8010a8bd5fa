import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.data.interleaved_samples import edit, encoded
from unirl import cli
from unirl.data.atomic import DataError
from unirl.data.interleaved import write_interleaved
from unirl.jobs import data


def run(*words):
    return CliRunner().invoke(cli.app, ["data", *map(str, words)])


def unirl(*words):
    """The whole command, errors as a user sees them."""
    command = [sys.executable, "-c", "from unirl.cli import main; main()", "data", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def chat(name, content="What?"):
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}]}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    rows = [chat("one") | {"subset": "vqa"}, chat("two", "<image>What?") | {"images": ["a.png"]}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_import_validate_and_show_print_counts_and_turns(tmp_path, source):
    out = tmp_path / "store"
    imported = run("import", "messages", source, "--out", out)
    table = (
        "subset                 samples    images  learned images\n"
        "(none)                       1         1               0\n"
        "vqa                          1         0               0\n"
        "all                          2         1               0\n"
        "left out: 0\n"
    )
    assert imported.stdout == f"{table}{out}\n"
    assert run("validate", out).stdout == f"{table}{out}: holds\n"
    assert run("show", out, "--id", "two").stdout == (
        "two\n  user\n    <image 8 x 6>\n    What?\n  assistant\n  + That.\n"
    )
    assert run("show", out, "-n", "1").stdout.startswith("one (vqa)\n")


def test_results_as_json(tmp_path, source):
    imported = json.loads(run("import", "messages", source, "--out", tmp_path / "s", "--json").stdout)
    assert imported == json.loads((tmp_path / "s" / "manifest.json").read_text())
    found = json.loads(run("validate", tmp_path / "s", "--json").stdout)
    assert found["holds"]
    assert found["counts"] == imported["counts"]


def test_validate_names_bad_records_and_exits_with_4(tmp_path, source):
    source.write_text(source.read_text() + json.dumps(chat("three", "<image>")) + "\n")
    result = run("validate", source)
    assert result.exit_code == 4
    assert "left out: mine.jsonl row 2 'three': expected an image for each <image>" in result.stdout
    assert result.stdout.endswith("does not hold: more than 1.00% of 3 records are bad\n")
    assert run("validate", source, "--max-rejected-fraction", 0.5).exit_code == 0


def test_validate_finds_a_store_that_was_altered(tmp_path, source):
    run("import", "messages", source, "--out", tmp_path / "s")
    shard = tmp_path / "s" / "interleaved-00000.parquet"
    data_bytes = bytearray(shard.read_bytes())
    data_bytes[len(data_bytes) // 2] ^= 1
    shard.write_bytes(data_bytes)
    result = unirl("validate", tmp_path / "s")
    assert result.returncode == 4
    assert "expected sha256" in result.stderr


def test_show_writes_a_page_and_names_an_unknown_id(tmp_path):
    path = tmp_path / "t.parquet"
    write_interleaved(path, [edit()])
    assert data.show(path, out=tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_text().count("<img ") == 2
    with pytest.raises(DataError, match="expected a sample 'x'; got none; list some with --count"):
        data.show(path, name="x")


def test_show_suggests_ids_that_contain_what_was_asked_for(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [chat("c01"), chat("drawing/c0"), chat("drawing/c2"), chat(None)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match=r"got none; did you mean drawing/c0 or c01\?"):
        data.show(path, name="c0")
    with pytest.raises(DataError, match=r"did you mean t/3\?"):
        data.show(path, name="3")


@pytest.mark.parametrize(
    ("text", "held", "shown"),
    [
        ("", "it has no records", "got no record;"),
        ('{"id": "a", "talk": []}\n', "none of 1 records is good", "got 1 records, none of them good: expected a list"),
    ],
)
def test_a_file_without_a_good_sample_is_said_to_have_none(tmp_path, text, held, shown):
    path = tmp_path / "nothing.jsonl"
    path.write_text(text)
    result = run("validate", path)
    assert result.exit_code == 4
    assert result.stdout.endswith(f"does not hold: {held}\n")
    with pytest.raises(DataError, match=shown):
        data.show(path)


def test_mistakes_on_the_command_line_are_named_with_what_to_do(tmp_path, source):
    unknown = unirl("import", "coco", source, "--out", tmp_path / "s")
    assert unknown.returncode == 2
    assert "importer (coco) is not one; take one of cot_collection, laion_normal, llava_cot" in unknown.stderr
    odd = unirl("import", "cot_collection", source, "--out", tmp_path / "s", "--sessions")
    assert odd.returncode == 2
    assert "--sessions (true) is no option of cot_collection; it takes none" in odd.stderr
    (tmp_path / "mapping.yaml").write_text("a: [")
    torn = unirl("import", "unifiedvisual", source, "--out", tmp_path / "s", "--mapping", tmp_path / "mapping.yaml")
    assert torn.returncode == 2
    assert "could not be read" in torn.stderr
    (tmp_path / "mapping.yaml").write_text("turn: conversations")
    odd = unirl("import", "unifiedvisual", source, "--out", tmp_path / "s", "--mapping", tmp_path / "mapping.yaml")
    assert odd.returncode == 2
    assert "mapping.yaml) is no mapping: it has 'turn', did you mean turns?; it takes keys files, id, tu" in odd.stderr
    absent = unirl("import", "messages", tmp_path / "none", "--out", tmp_path / "s")
    assert absent.returncode == 4
    assert "expected a file, or a folder with *.parquet or *.jsonl or *.json; got none" in absent.stderr
    assert not (tmp_path / "s").exists()
