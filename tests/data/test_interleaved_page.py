from dataclasses import replace
from html.parser import HTMLParser

from tests.data.interleaved_samples import edit, picture
from unirl.data.interleaved_page import render_page, sample_lines
from unirl.types import Segment


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_lines_mark_what_is_learned():
    assert list(sample_lines(edit())) == [
        "e0 (image_editing, made)",
        "  user",
        "    <image 8 x 6>",
        "    make it blue",
        "  assistant",
        "  + Blue it is.",
        "  + <image 8 x 6>",
    ]


def hostile(text):
    user, answer = edit().turns
    turn = replace(user, segments=(Segment(text=text), Segment(image=picture(0, 500, 900))))
    return replace(edit(text), turns=(turn, answer), subset=text, source=text)


def test_no_text_becomes_a_tag_or_reaches_the_terminal_as_a_command():
    text = "<script>alert(1)</script> \x1b[31m \" ' </p>"
    page = Tags(render_page([hostile(text)], title="<b>"))
    assert {tag for tag, _ in page.tags} == {"html", "meta", "title", "style", "h1", "h2", "h3", "p", "section", "div",
                                             "img"}  # fmt: skip
    assert page.text.count("<script>alert(1)</script>") == 4
    assert not any("\x1b" in line for line in sample_lines(hostile(text)))
    assert any(r"\x1b[31m" in line for line in sample_lines(hostile(text)))


def test_a_page_holds_shrunk_images_and_marks_what_is_learned():
    page = Tags(render_page([hostile("a")], title="t"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["alt"] == "900 x 500 pixels"
    assert len(images[0]["src"]) < 900 * 500
    assert sum(attributes.get("class") == "learned" for _, attributes in page.tags) == 2


def test_a_page_without_marks_says_nothing_of_the_loss():
    page = Tags(render_page([edit()], title="t", marks=False))
    assert not any(attributes.get("class") == "learned" for _, attributes in page.tags)
    assert "loss" not in page.text


def test_small_pictures_are_shown_enlarged_pixel_by_pixel():
    page = render_page([edit(), hostile("a")], title="t")
    images = [attributes for tag, attributes in Tags(page).tags if tag == "img"]
    assert [(image.get("class"), image.get("width")) for image in images] == [
        ("small", "200"), ("small", "200"), (None, None), ("small", "200"),
    ]  # fmt: skip
    assert ".small { image-rendering: pixelated }" in page
