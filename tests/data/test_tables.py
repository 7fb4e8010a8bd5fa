import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unirl.data.atomic import DataError
from unirl.data.tables import stream_rows, write_json_lines, write_table

SCHEMA = pa.schema({"id": pa.string(), "image": pa.binary()})


def test_heavy_rows_end_a_row_group_early(tmp_path):
    rows = [{"id": str(place), "image": bytes(2**24)} for place in range(5)]
    assert write_table(tmp_path / "t.parquet", iter(rows), SCHEMA) == 5
    table = pq.ParquetFile(tmp_path / "t.parquet")
    assert [table.metadata.row_group(place).num_rows for place in range(table.num_row_groups)] == [2, 2, 1]
    assert list(stream_rows(tmp_path / "t.parquet")) == rows


def test_only_the_named_columns_of_a_table_are_read(tmp_path):
    write_table(tmp_path / "t.parquet", [{"id": "a", "image": b"x"}], SCHEMA)
    assert list(stream_rows(tmp_path / "t.parquet", ["id", "absent"])) == [{"id": "a"}]


def test_json_lines_come_back_and_torn_or_odd_lines_stand_as_their_errors(tmp_path):
    path = tmp_path / "t.jsonl"
    assert write_json_lines(path, [{"id": "a\u2028b"}, {"id": "c"}]) == 2
    with path.open("ab") as file:
        file.write(b"\n[1]\n" + b"[" * 100_000 + b'\n\xff{}\n{"id": "d", "te')
    good, errors = [], []
    for row in stream_rows(path):
        (errors if isinstance(row, DataError) else good).append(row)
    assert good == [{"id": "a\u2028b"}, {"id": "c"}]
    assert ["expected a record as a JSON object" in str(errors[0]), len(errors)] == [True, 4]
    assert "the file's last, perhaps cut off; got" in str(errors[-1])


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_and_a_json_object_give_their_records(tmp_path, indent):
    (tmp_path / "list.json").write_text(json.dumps([{"id": "a", "x": 0.5}, 3], indent=indent))
    (tmp_path / "object.json").write_text(json.dumps({"7": {"x": "ä"}, "8": {"id": "own"}}, indent=indent))
    first, odd = stream_rows(tmp_path / "list.json")
    assert first == {"id": "a", "x": 0.5}
    assert isinstance(odd, DataError)
    assert list(stream_rows(tmp_path / "object.json")) == [{"id": "7", "x": "ä"}, {"id": "own"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", b'{"0": {"source": "a"}, "1": {"sour', "expected one whole JSON list or object"),
        ("t.json", b"", "expected one JSON list or object of records; got an empty file"),
        ("t.parquet", b"PAR1", "expected a parquet file"),
        ("t.csv", b"a,b", r"expected one of .parquet, .jsonl, .json; got '.csv'"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(stream_rows(tmp_path / name))
    with pytest.raises(DataError, match="expected a file; got none"):
        list(stream_rows(tmp_path / "absent.jsonl"))


def test_one_big_json_object_is_read_in_the_memory_of_one_record(tmp_path):
    path = tmp_path / "big.json"
    with path.open("w") as file:
        record = json.dumps({"source": "s" * 3000, "target": "t"})
        file.write("{" + ",".join(f'"{place}":{record}' for place in range(4000)) + "}")
    tracemalloc.start()
    assert sum(len(row["source"]) for row in stream_rows(path)) == 12_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 < path.stat().st_size / 10
