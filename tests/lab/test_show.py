from PIL import Image

from unirl.lab.show import show


def test_a_sheet_and_its_answers_are_made(shipped_path, tmp_path):
    shown = show(shipped_path, tmp_path / "sheet", n=5, seed=0, guidance=1.5)
    assert len(shown) == 5
    assert all(record.prompt.startswith("a photo of") for record in shown)
    assert all(record.answer for record in shown)
    with Image.open(tmp_path / "sheet" / "lab.png") as sheet:
        assert sheet.mode == "RGB"
        assert len(sheet.getcolors(1 << 20)) > 5
