import json
import tracemalloc
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.interleaved_samples import edit, encoded, outline, picture, same
from unirl.data.atomic import DataError
from unirl.data.interleaved import SCHEMA_VERSION, data_files, stream_interleaved, write_interleaved, write_rows
from unirl.data.messages import image_part, text_part

SAMPLES = [edit("a", 0), replace(edit("b", 4), subset=""), edit("c", 0)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("files", [False, True])
def test_what_is_written_comes_back(tmp_path, suffix, files):
    path = tmp_path / f"interleaved{suffix}"
    assert write_interleaved(path, iter(SAMPLES), images=tmp_path / "images" if files else None) == 3
    rejected = []
    read = list(stream_interleaved(path, rejected, max_rejected_fraction=0))
    assert rejected == []
    assert all(same(a, b) for a, b in zip(read, SAMPLES, strict=True))
    assert all(same(a, b) for a, b in zip(stream_interleaved(tmp_path, []), SAMPLES, strict=True))
    assert len(list((tmp_path / "images").iterdir()) if files else [0] * 4) == 4  # equal images share a file


def test_images_keep_the_bytes_and_the_format_they_came_in(tmp_path):
    data = {form: encoded(form=form) for form in ("JPEG", "WEBP", "PNG")}
    parts = [image_part(value, loss=False) for value in data.values()]
    row = {"id": "a", "subset": "", "source": "", "messages": [
        {"role": "user", "content": parts}, {"role": "assistant", "content": [text_part("x", loss=True)]}
    ]}  # fmt: skip
    write_rows(tmp_path / "t.parquet", [row], images=tmp_path / "images")
    suffixes = {path.suffix: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert suffixes == {".jpg": data["JPEG"], ".webp": data["WEBP"], ".png": data["PNG"]}
    assert len(next(stream_interleaved(tmp_path / "t.parquet", [])).turns[0].images) == 3


def test_without_pixels_only_the_sizes_are_read(tmp_path):
    path = tmp_path / "t.jsonl"
    write_interleaved(path, [edit()])
    (whole,) = stream_interleaved(path, [])
    (blank,) = stream_interleaved(path, [], pixels=False)
    assert outline(blank) == outline(whole)
    assert not blank.turns[0].images[0].any()


def test_only_the_asked_ids_are_read(tmp_path):
    path = tmp_path / "t.jsonl"
    write_interleaved(path, SAMPLES, images=tmp_path / "images")
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    rejected = []
    assert list(stream_interleaved(path, rejected, only={"b"}, max_rejected_fraction=1)) == []
    assert [record.id for record in rejected] == ["b"]


def test_bad_records_are_left_out_with_their_reasons(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": "x", "messages": [{"role": "user", "content": "q"}]},
        {"id": "d", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"id": "d", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"id": "torn", "mess')
    rejected = []
    read = list(stream_interleaved(path, rejected, max_rejected_fraction=0.6))
    assert [sample.id for sample in read] == ["mine/0", "d"]
    assert [(record.row, record.id, record.source) for record in rejected] == [
        (1, "x", "mine.jsonl"), (3, "d", "mine.jsonl"), (4, "", "mine.jsonl"),
    ]  # fmt: skip
    assert "second time" in rejected[1].reason
    with pytest.raises(DataError, match=r"at most 1.00% bad records of 5; got 3.*assistant's answer"):
        list(stream_interleaved(path, []))


def test_a_table_of_another_tool_with_markers_and_an_image_list_is_read(tmp_path):
    path = tmp_path / "theirs.parquet"
    row = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}],
           "images": [{"bytes": encoded(), "path": "x.png"}], "score": 1.0}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), path)
    (sample,) = stream_interleaved(path, [])
    assert sample.id == "theirs/0"
    assert outline(sample) == [("user", "-(6, 8)", "-What?"), ("assistant", "+That.")]


def test_other_versions_and_other_records_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_interleaved(path, [edit()])
    table = pq.read_table(path)
    for metadata in ({"unirl_schema_version": "9", "unirl_record": "InterleavedSample"}, {"unirl_record": "Other"}):
        pq.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(DataError, match=f"of schema version {SCHEMA_VERSION}; got"):
            data_files(path)


def test_a_folder_without_samples_is_named(tmp_path):
    with pytest.raises(DataError, match=r"expected a store with manifest\.json"):
        data_files(tmp_path)
    for manifest in ("{", "[]", '{"schema_version": 1, "files": {"../x": {"bytes": 1}}}'):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(DataError, match="expected a manifest of a store"):
            data_files(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 9, "files": {}}')
    with pytest.raises(DataError, match="expected schema version 1; got 9"):
        data_files(tmp_path)
    with pytest.raises(DataError, match=r"expected to write .parquet or .jsonl; got '.csv'"):
        write_interleaved(tmp_path / "x.csv", [])


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "t.parquet"
    write_interleaved(path, [edit()])
    whole = path.read_bytes()
    errors = 0
    for place in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            (read,) = stream_interleaved(path, [], max_rejected_fraction=0)
        except DataError:
            errors += 1
        else:
            assert same(read, edit())
    assert errors > len(whole) / 23 / 2


def test_reading_and_writing_hold_one_sample_at_a_time(tmp_path):
    turn, answer = edit().turns

    def samples():
        for place in range(300):
            segments = (replace(turn.segments[0], image=picture(place, 100, 100)), turn.segments[1])
            yield replace(edit(f"s{place}"), turns=(replace(turn, segments=segments), answer))

    path = tmp_path / "t.jsonl"
    tracemalloc.start()
    write_interleaved(path, samples())
    assert sum(1 for _ in stream_interleaved(path, [])) == 300
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 2**20 < path.stat().st_size / 5
