"""The page's own files: what they are made of, and what they may not do."""

import hashlib
import re
from pathlib import Path

import pytest

from unirl.dashboard.app import STATIC

OWN = sorted(file for file in STATIC.iterdir() if file.suffix in (".js", ".html", ".css"))


def test_what_others_made_is_unchanged_and_licensed():
    documented = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() in documented, name
    assert "MIT License" in (STATIC / "vendor" / "LICENSE").read_text()


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.name)
def test_the_page_parses_no_data_as_html_and_leads_nowhere_else(file):
    text = file.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", text)
    addresses = re.findall(r"""(?:href|src|from|fetch\(|url\()\s*=?\s*["'`(]?((?:[a-z]+:)?//?[^"'`\s)]+)""", text)
    assert addresses == [], "only addresses relative to the page work below a prefix"
    if file.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", text), "the policy forbids inline parts"
