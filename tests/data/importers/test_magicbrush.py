import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded, outline

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = pa.schema(
    {"img_id": pa.string(), "turn_index": pa.int32(), "source_img": IMAGE, "mask_img": IMAGE,
     "instruction": pa.string(), "target_img": IMAGE}
)  # fmt: skip


def cell(seed):
    return {"bytes": encoded(seed, height=seed + 1), "path": f"{seed}.png"}


def turn(name, index, source, target):
    return {"img_id": name, "turn_index": index, "source_img": cell(source), "mask_img": cell(9),
            "instruction": f"edit {index}", "target_img": cell(target)}  # fmt: skip


def download(tmp_path, rows):
    (tmp_path / "data").mkdir()
    for place, part in enumerate((rows[:1], rows[1:])):
        path = tmp_path / "data" / f"train-0000{place}-of-00002-abc.parquet"
        pq.write_table(pa.Table.from_pylist(part, SCHEMA), path)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "data" / "dev-00000-of-00001.parquet")
    return tmp_path


ROWS = [turn("7", 1, 0, 1), turn("7", 2, 1, 2), turn("8", 1, 3, 4), turn("9", 2, 5, 6)]


def test_each_turn_of_the_train_split_is_an_edit_of_its_own_source(tmp_path):
    samples = made(tmp_path, "magicbrush", download(tmp_path, ROWS))
    assert [outline(sample) for sample in samples[:2]] == [
        [("user", "-(1, 8)", "-edit 1"), ("assistant", "+(2, 8)")],
        [("user", "-(2, 8)", "-edit 2"), ("assistant", "+(3, 8)")],
    ]
    assert [(sample.subset, sample.source) for sample in samples] == [("image_editing", "magicbrush")] * 4


def test_a_session_is_one_conversation_that_gives_its_source_once(tmp_path):
    reasons = []
    first, second = made(tmp_path, "magicbrush", download(tmp_path, ROWS), bad=reasons, sessions=True)
    assert outline(first) == [
        ("user", "-(1, 8)", "-edit 1"), ("assistant", "+(2, 8)"), ("user", "-edit 2"), ("assistant", "+(3, 8)"),
    ]  # fmt: skip
    assert (first.id, second.id) == ("magicbrush/session/7", "magicbrush/session/8")
    assert reasons[0].startswith("expected turns 1, 2, 3, ... of one session in a row; got [2]")


def test_a_row_without_image_bytes_is_left_out(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"target_img": {"bytes": None, "path": "x.png"}}, ROWS[2] | {"instruction": None}]
    reasons = []
    assert len(made(tmp_path, "magicbrush", download(tmp_path, rows), bad=reasons)) == 1
    assert ["'target_img'" in reasons[0], "'instruction'" in reasons[1]] == [True, True]
