import dataclasses

import pytest

from unirl.evaluation.run_reader import read_run
from unirl.evaluation.side_by_side import image_tag, side_by_side


@pytest.fixture
def results(run_dir):
    return tuple(read_run(run_dir).evaluations.values())


def test_ten_pairs_show_both_answers_and_both_images(run_dir, results):
    html = side_by_side(run_dir, *results, 10)
    assert html.count("<article") == 10
    assert html.count("data:image/webp;base64,") == 30, "a question's image, an image before, an image after"
    assert html.count('class="answer"') == 20
    assert html.count("✓ right") + html.count("✗ wrong") == 40
    assert 'class="pixel"' in html


def test_verdicts_are_those_of_the_scores(run_dir, results):
    _, after = results
    html = side_by_side(run_dir, None, after, 40)
    shown = [item for item in after.items if item.mode == "sampled"]
    right = sum(item.parts.get("accuracy/correct", item.parts.get("lab_verifier/exact")) == 1 for item in shown)
    assert html.count("✓ right") == right
    assert html.count("<article") == 40
    assert "before" not in html


def test_unjudged_and_missing_are_said(run_dir, results):
    _, after = results
    first = dataclasses.replace(after.items[0], reward=None, prompt_image=None)
    html = side_by_side(run_dir, None, dataclasses.replace(after, items=(first,)), 1)
    assert "could not be judged" in html
    assert "image missing" in html


@pytest.mark.parametrize("name", ["../secret.webp", "/etc/hostname", "none.webp", "", None, "run.json"])
def test_only_pictures_of_the_run_are_shown(run_dir, name):
    (run_dir.parent / "secret.webp").write_bytes(next((run_dir / "images").glob("*.webp")).read_bytes())
    assert image_tag(run_dir, name, "x") == '<div class="missing">image missing</div>'
