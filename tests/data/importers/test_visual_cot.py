import json

import numpy as np
import pytest

from tests.data.importers.made_store import made
from tests.data.interleaved_samples import encoded, outline, picture
from unirl.data.importers.visual_cot import crop

METADATA = {"question": "What is left of the dog?", "answer": "A cat.", "image": "a.jpg",
            "width": 400, "height": 300, "dataset": "vsr", "split": "train",
            "bboxs": [[10.0, 20.0, 60.0, 90.0], [30.0, 10.0, 70.0, 40.0]]}  # fmt: skip
REQUEST = "Please provide the bounding box coordinate of the region that can help you answer the question better."
TALK = {
    "dataset": "flickr30k", "split": "train", "question_id": 1,
    "image": ["cot/flickr30k/b.jpg", "cot/flickr30k/b.jpg###[390, 10, 400, 20]"],
    "conversations": [
        {"from": "human", "value": f"<image>\nWhat is there? {REQUEST}"},
        {"from": "gpt", "value": "[0.9, 0.1, 1.0, 0.2]"},
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A lamp."},
    ],
}  # fmt: skip


@pytest.fixture
def images(tmp_path):
    for name in ("images/vsr/a.jpg", "images/cot/flickr30k/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(0, 300, 400, "JPEG"))
    return str(tmp_path / "images")


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((190, 140, 210, 160), (38, 262), (88, 312)),  # small: 112 px each way
        ((60, 100, 340, 200), (10, 290), (60, 340)),  # the longer side counts
        ((0, 0, 20, 20), (0, 224), (0, 224)),  # shifted inside
        ((390, 280, 400, 300), (76, 300), (176, 400)),
        ((0, 0, 400, 300), (0, 300), (0, 400)),  # larger than the image: cut
    ],
)
def test_the_crop_is_the_square_around_the_box_kept_inside_the_image(box, rows, columns):
    image = picture(0, 300, 400)
    np.testing.assert_array_equal(crop(image, box), image[slice(*rows), slice(*columns)])


def test_a_crop_of_a_small_image_is_the_image():
    assert crop(picture(0, 50, 60), (1, 1, 3, 3)).shape == (50, 60, 3)


def test_metadata_files_give_question_crop_and_answer(tmp_path, images):
    source = tmp_path / "source" / "metadata"
    source.mkdir(parents=True)
    (source / "vsr_cot_train.jsonl").write_text(f"{json.dumps(METADATA)}\n")
    (sample,) = made(tmp_path, "visual_cot", source.parent, images=images)
    assert outline(sample) == [
        ("user", "-(300, 400)", "-What is left of the dog?"),
        ("assistant", "+The question is about this part of the image:", "+(224, 224)",
         "+With this detail in view, the answer is: A cat."),
    ]  # fmt: skip
    assert (sample.id, sample.subset) == ("visual_cot/vsr_cot_train/0", "mm_reasoning_o")
    shown, part = sample.turns[0].images[0], sample.turns[1].images[0]
    assert np.abs(part.astype(int) - shown[:224, :224]).mean() < 12  # a JPEG of it


def test_the_conversation_file_gives_the_pixel_box_and_loses_its_box_request(tmp_path, images):
    (tmp_path / "viscot_363k.json").write_text(json.dumps([TALK]))
    (sample,) = made(tmp_path, "visual_cot", tmp_path / "viscot_363k.json", images=images)
    assert outline(sample)[0] == ("user", "-(300, 400)", "-What is there?")
    assert sample.turns[1].segments[2].text.endswith("the answer is: A lamp.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bboxs": []}, "expected boxes of four numbers"),
        ({"bboxs": [[1, 2, 3]]}, "expected boxes of four numbers"),
        ({"bboxs": [[1, 2, 3, float("nan")]]}, "expected boxes of four numbers"),
        ({"bboxs": [[60, 20, 10, 90]]}, "expected a box inside the image"),
        ({"bboxs": [[10, 20, 500, 90]]}, "expected a box inside the image of 400 x 300"),
        ({"width": 800}, "expected an image of (800, 300) pixels as its record says; got 400 x 300"),
        ({"image": "../a.jpg"}, "a path inside the table's folder"),
        ({"image": "none.jpg"}, "got none there"),
        ({"answer": ""}, "expected text under 'answer'"),
    ],
)
def test_a_record_whose_box_or_image_does_not_fit_is_left_out(tmp_path, images, change, reason):
    source = tmp_path / "x_cot_train.jsonl"
    source.write_text(f"{json.dumps(METADATA)}\n{json.dumps(METADATA | change)}\n")
    reasons = []
    assert len(made(tmp_path, "visual_cot", source, bad=reasons, images=images)) == 1
    assert reason in reasons[0]
