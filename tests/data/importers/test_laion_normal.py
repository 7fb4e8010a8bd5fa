import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded
from unirl.config_rules import ConfigError


def write(tmp_path, names):
    rows = [{"URL": "http://x", "TEXT": f"a  cat number {i}.", "WIDTH": 8, "hash": i - 5} for i in range(len(names))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "laion.parquet")
    for place, name in enumerate(names):
        if name:
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name).write_bytes(encoded(place, form="JPEG"))
    return tmp_path / "laion.parquet"


def test_captions_become_requests_and_images_are_found_by_hash_or_row(tmp_path):
    source = write(tmp_path, ["-5.jpg", "1.png", "00000/000000002.webp", None])
    reasons = []
    samples = made(tmp_path, "laion_normal", source, bad=reasons, images=str(tmp_path / "images"))
    assert [sample.id for sample in samples] == ["laion_normal/0", "laion_normal/1", "laion_normal/2"]
    for place, sample in enumerate(samples):
        user, answer = sample.turns
        assert f"a cat number {place}" in user.segments[0].text
        assert not user.segments[0].text.endswith("..")
        assert [segment.in_loss for segment in answer.segments] == [True, True]
        assert answer.images[0].shape == (6, 8, 3)
    assert "expected an image named -2 or 3 or 00000/000000003 in" in reasons[0]


def test_wordings_vary_and_depend_on_the_row_alone(tmp_path):
    source = write(tmp_path, [f"{place}.jpg" for place in range(60)])
    images = str(tmp_path / "images")
    whole = made(tmp_path, "laion_normal", source, images=images)
    some = made(tmp_path, "laion_normal", source, images=images, max_samples=7)
    first = {sample.id: sample.turns[0].segments[0].text for sample in whole}
    assert {first[sample.id] for sample in some} == {sample.turns[0].segments[0].text for sample in some}
    assert len({text.partition("a cat")[0] for text in first.values()}) == 10


def test_the_folder_of_images_must_be_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--images .* must be given for laion_normal"):
        made(tmp_path, "laion_normal", write(tmp_path, [None]))
