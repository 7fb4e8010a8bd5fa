import json

import pytest

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded, outline
from tests.data.test_archives import cut, zipped
from unirl.data.atomic import DataError

ANSWER = (
    "<SUMMARY> s </SUMMARY>\n\n<CAPTION> c </CAPTION>\n\n<REASONING> r </REASONING>\n\n<CONCLUSION> 4 </CONCLUSION>"
)


@pytest.fixture
def download(tmp_path):
    source = tmp_path / "LLaVA-CoT-100k"
    source.mkdir()
    images = {f"sqa/train/{place}/image.png": encoded(place, 40, 40) for place in range(3)}
    rows = [
        {"id": str(place), "image": name,
         "conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": ANSWER}]}
        for place, name in enumerate([*images, "sqa/train/9/image.png"])
    ]  # fmt: skip
    (source / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cut(source / "image.zip", zipped(images), [3000, 5000])
    return source


def test_images_come_out_of_the_parts_of_the_zip(tmp_path, download):
    reasons = []
    samples = made(tmp_path, "llava_cot", download, bad=reasons)
    assert [sample.id for sample in samples] == [f"llava_cot/train/{place}" for place in range(3)]
    assert outline(samples[0]) == [("user", "-(40, 40)", "-How many?"), ("assistant", f"+{ANSWER}")]
    assert {(sample.subset, sample.source) for sample in samples} == {("understanding", "llava_cot")}
    (reason,) = reasons
    assert "expected an image 'sqa/train/9/image.png' in image.zip.part-aa, image.zip.part-ab" in reason


def test_a_missing_part_is_named_before_anything_is_read(tmp_path, download):
    (download / "image.zip.part-ac").unlink()
    with pytest.raises(DataError, match="copy the missing or cut off parts again"):
        made(tmp_path, "llava_cot", download)
