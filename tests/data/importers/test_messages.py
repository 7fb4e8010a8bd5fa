import json

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded, outline


def test_every_file_of_a_folder_is_read_with_images_below_it(tmp_path):
    source = tmp_path / "mine"
    (source / "pictures").mkdir(parents=True)
    (source / "pictures" / "a.jpg").write_bytes(encoded(form="JPEG"))
    chat = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}],
            "images": ["pictures/a.jpg"]}  # fmt: skip
    (source / "a.jsonl").write_text(f"{json.dumps(chat | {'id': 'own'})}\n{json.dumps(chat)}\n")
    samples = made(tmp_path, "messages", source)
    assert [sample.id for sample in samples] == ["own", "messages/a/1"]
    assert outline(samples[0]) == [("user", "-(6, 8)", "-What?"), ("assistant", "+That.")]


def test_a_json_list_and_parquet_are_read_with_images_elsewhere(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded())
    row = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}],
           "image": "a.png", "subset": "vqa"}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        (sample,) = made(tmp_path, "messages", tmp_path / name, images=str(tmp_path / "pictures"))
        assert (sample.subset, outline(sample)) == ("vqa", [("user", "-(6, 8)", "-What?"), ("assistant", "+That.")])
