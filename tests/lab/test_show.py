import numpy as np
from PIL import Image, ImageColor

from unirl.lab.show import _BAD, _GOOD, Shown, _sheet, show
from unirl.lab.world import HELDOUT_CATEGORIES


def test_a_sheet_and_its_answers_are_made(shipped_path, tmp_path):
    shown = show(shipped_path, tmp_path / "sheet", n=5, seed=0, guidance=1.5)
    assert len(shown) == 5
    assert all(record.prompt.startswith("a photo of") for record in shown)
    assert all(record.answer for record in shown)
    assert {record.category for record in shown} == set(HELDOUT_CATEGORIES)
    with Image.open(tmp_path / "sheet" / "lab.png") as sheet:
        assert sheet.mode == "RGB"
        assert len(sheet.getcolors(1 << 20)) > 5


def test_a_sheet_says_how_to_read_it_and_colours_its_verdicts():
    images = np.zeros((5, 20, 20, 3), np.uint8)
    shown = [
        Shown(category="c", prompt="p", exact=good, partial=0.5, question="q ? A x B y", answer="x A", right=good)
        for good in (True, True, True, True, False)
    ]
    sheet = np.asarray(_sheet(shown, images, images))
    head = np.flatnonzero((sheet == 0).all(axis=2)[:, 16 : 16 + 160].all(axis=1))[0]
    legend, first_row, last_row = (
        sheet[:head],
        sheet[head : (head + len(sheet)) // 2],
        sheet[(head + len(sheet)) // 2 :],
    )

    def holds(part, color):
        return (part == ImageColor.getrgb(color)).all(axis=-1).any()

    assert (holds(legend, _GOOD), holds(legend, _BAD)) == (True, True)
    assert (holds(first_row, _GOOD), holds(first_row, _BAD)) == (True, False)
    assert (holds(last_row, _GOOD), holds(last_row, _BAD)) == (False, True)
