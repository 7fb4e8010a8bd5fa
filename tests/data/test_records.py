import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unirl.data.atomic import DataError
from unirl.data.records import (
    Rejected,
    decode_image,
    encode_png,
    file_name,
    image_key,
    read_image_file,
    read_samples,
    stream_samples,
    write_samples,
)
from unirl.types import GenerationSample, UnderstandingSample

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda value: value.strip())
images = st.builds(
    lambda height, width, seed: np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 999),
)
choice_questions = st.integers(2, 6).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "choices": st.lists(text, min_size=n, max_size=n).map(tuple),
            "answer": st.sampled_from("ABCDEF"[:n]),
            "answer_type": st.just("choice"),
        }
    )
)
open_questions = st.fixed_dictionaries({"answer": text, "answer_type": st.sampled_from(["number", "math", "text"])})
understanding = st.builds(
    lambda answer, **rest: UnderstandingSample(**answer, **rest),
    st.one_of(choice_questions, open_questions),
    id=text,
    image=images,
    question=text,
    category=st.text(max_size=5),
)
generation = st.builds(
    GenerationSample,
    id=text,
    prompt=text,
    image=st.none() | images,
    class_name=st.text(max_size=5),
    source=st.just("s"),
)


def same(a, b):
    equal_images = np.array_equal(a.image, b.image) if a.image is not None else b.image is None
    return equal_images and replace(a, image=b.image) == b


@pytest.mark.parametrize(("kind", "samples"), [(UnderstandingSample, understanding), (GenerationSample, generation)])
@pytest.mark.parametrize("image_files", [False, True])
def test_what_is_written_comes_back(kind, samples, image_files):
    @settings(max_examples=25, deadline=None)
    @given(st.lists(samples, max_size=5, unique_by=lambda sample: sample.id))
    def check(written):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file_name(kind)
            assert write_samples(path, written, kind, images=path.parent / "images" if image_files else None) == len(
                written
            )
            read, rejected = read_samples(path.parent, kind)
            assert rejected == []
            assert len(read) == len(written)
            assert all(same(a, b) for a, b in zip(read, written, strict=True))

    check()


@pytest.fixture
def sample():
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    return UnderstandingSample(id="u0", image=image, question="what ?", choices=("red", "blue"), answer="B")


def write_rows(path, sample, *changes):
    """A table with `sample` as often as there are changes, each row changed."""
    write_samples(path, [replace(sample, id=f"u{i}") for i in range(len(changes))], UnderstandingSample)
    table = pq.read_table(path)
    rows = [row | change for row, change in zip(table.to_pylist(), changes, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


PNG = encode_png(np.full((8, 8, 3), 7, np.uint8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image": {"bytes": PNG[:40], "path": None}}, "do not decode"),
        ({"image": {"bytes": b"", "path": None}}, "got 0 bytes: the file is empty;"),
        ({"image": {"bytes": b"GIF89a", "path": None}}, "do not decode (cannot identify image file);"),
        ({"image": None}, "expected a value for 'image'"),
        ({"image": {"bytes": None, "path": "images/none.png"}}, "got none there"),
        ({"image": {"bytes": None, "path": "../secret.png"}}, "inside the table's folder"),
        ({"image": {"bytes": None, "path": "/etc/hostname"}}, "inside the table's folder"),
        ({"image": {"bytes": None, "path": None}}, "inside the table's folder"),
        ({"question": "  "}, "expected a question; got only blanks"),
        ({"question": None}, "expected a value for 'question'"),
        ({"answer": "C"}, "the letter of the right one; got 2 choices and answer 'C'"),
        ({"answer": ""}, "expected a gold answer"),
        ({"choices": ["red", None]}, "expected a text for every choice"),
        ({"answer_type": "essay"}, "expected answer_type"),
        ({"id": "u0"}, "a second time"),
        ({"id": None}, "expected a value for 'id'"),
    ],
)
def test_a_bad_record_is_left_out_with_its_reason(tmp_path, sample, change, reason):
    path = tmp_path / "understanding.parquet"
    write_rows(path, sample, {}, change, {})
    log = tmp_path / "rejected.jsonl"
    read, rejected = read_samples(path, UnderstandingSample, max_rejected_fraction=0.5, rejected_log=log)
    assert [record.id for record in read] == ["u0", "u2"]
    assert [record.row for record in rejected] == [1]
    assert reason in rejected[0].reason
    assert Rejected(**json.loads(log.read_text())) == rejected[0]


def test_too_many_bad_records_stop_the_reading_and_are_named(tmp_path, sample):
    path, log = tmp_path / "understanding.parquet", tmp_path / "rejected.jsonl"
    write_rows(path, sample, {}, {"question": ""}, {"answer": "Z"})
    with pytest.raises(DataError, match=r"at most 1\.00% bad records of 3; got 1: row 1 \(u1\).*max_rejected_fraction"):
        read_samples(path, UnderstandingSample, rejected_log=log)
    assert len(log.read_text().splitlines()) == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_image_bytes_are_a_data_error_or_an_image(data):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format=data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"])))
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        image = decode_image(bytes(damaged))
    except DataError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


def test_images_are_turned_upright_and_made_rgb():
    wide = Image.fromarray(np.zeros((4, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    turned, grey = io.BytesIO(), io.BytesIO()
    wide.save(turned, format="JPEG", exif=exif)
    wide.convert("LA").save(grey, format="PNG")
    assert decode_image(turned.getvalue()).shape == (9, 4, 3)
    assert decode_image(grey.getvalue()).shape == (4, 9, 3)
    assert decode_image(turned.getvalue(), pixels=False).shape == (9, 4, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_size_is_read_without_the_pixels(form):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)).save(buffer, format=form)
    half = buffer.getvalue()[: buffer.tell() // 2]
    blank = decode_image(half, pixels=False)
    assert (blank.shape, blank.max(), blank.strides) == ((300, 200, 3), 0, (0, 0, 0))
    with pytest.raises(DataError, match="do not decode"):
        decode_image(half)


def test_sixteen_bit_images_are_refused():
    deep = io.BytesIO()
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(deep, format="PNG")
    with pytest.raises(DataError, match="expected an 8-bit image"):
        decode_image(deep.getvalue())


def test_equal_pixels_have_one_key_and_other_shapes_another():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert image_key(image) == image_key(np.asfortranarray(image))
    assert image_key(image) != image_key(image.reshape(4, 2, 3))


def test_a_table_of_another_tool_is_read_when_its_columns_fit(tmp_path, sample):
    path = tmp_path / "mine.parquet"
    row = {"image": {"bytes": PNG, "path": "x.png"}, "question": "how many ?", "answer": 3, "id": "a"}
    pq.write_table(pa.Table.from_pylist([row | {"answer_type": "number", "extra": 1.0}]), path)
    (read,) = stream_samples(path, UnderstandingSample, [])
    assert (read.answer, read.choices, read.image.shape) == ("3", (), (8, 8, 3))


def test_wrong_files_are_named(tmp_path, sample):
    path = tmp_path / "understanding.parquet"
    with pytest.raises(DataError, match="expected a parquet file"):
        read_samples(path, UnderstandingSample)
    write_samples(path, [sample], UnderstandingSample)
    whole = path.read_bytes()
    with pytest.raises(DataError, match="expected GenerationSample records"):
        read_samples(path, GenerationSample)
    pq.write_table(pq.read_table(path).replace_schema_metadata({"unirl_schema_version": "9"}), path)
    with pytest.raises(DataError, match="of version 9"):
        read_samples(path, UnderstandingSample)
    pq.write_table(pq.read_table(path, columns=["id", "image"]), path)
    with pytest.raises(DataError, match=r"columns missing: \['answer', 'question'\]"):
        read_samples(path, UnderstandingSample)
    pq.write_table(pa.table({"id": ["a"], "image": ["x"], "question": ["q"], "answer": ["b"]}), path)
    with pytest.raises(DataError, match="expected readable columns"):
        read_samples(path, UnderstandingSample)
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="expected a parquet file"):
        read_samples(path, UnderstandingSample)


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path, sample):
    path = tmp_path / "understanding.parquet"
    write_samples(path, [sample], UnderstandingSample)
    whole = path.read_bytes()
    errors = 0
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            (read,), _ = read_samples(path, UnderstandingSample)
        except DataError:
            errors += 1
        else:
            assert same(read, sample)
    assert errors > len(whole) / 5 / 2


def test_the_same_samples_give_the_same_bytes(tmp_path, sample):
    for name in ("a", "b"):
        write_samples(tmp_path / name, [sample], UnderstandingSample)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_writer_leaves_the_old_file(tmp_path, sample):
    path = tmp_path / "understanding.parquet"
    write_samples(path, [sample], UnderstandingSample)
    before = path.read_bytes()

    def broken():
        for i in range(600):
            yield replace(sample, id=f"n{i}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(path, broken(), UnderstandingSample)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_out_of_the_folder_is_no_image(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.png").write_bytes(PNG)
    (folder / "alias.png").symlink_to("in.png")
    (folder / "loop").symlink_to("loop")
    assert read_image_file(folder, "in.png") == read_image_file(folder, "alias.png") == PNG
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(DataError, match="a path inside the table's folder"):
            read_image_file(folder, name)
    for name in ("loop", "none.png", "a" * 300, ".", "\0"):
        with pytest.raises(DataError, match="expected"):
            read_image_file(folder, name)
